"""Fields of requests' bodies: what is done, what is refused, what may be ignored, and what nobody knows.

A field that would change the answer is never ignored. The fields that are done are those of the dialects' models; the
tables here hold every other field that a client of these protocols may send (OpenAI's and vLLM's requests, TGI's and
the contest's parameters), so that a test can walk them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, FailFast

from isologit.errors import RequestError

T = TypeVar("T")

WARNING_HEADER = "x-isologit-warning"
WARNINGS = "isologit.warnings"  # in the ASGI scope: names of fields that nobody knows
_MOST_SHOWN = 8
_MOST_LOGGED = 256  # names; clients choose them
_PLAIN_NAME = re.compile(r"[A-Za-z_][\w.-]{0,39}", re.ASCII)

_log = logging.getLogger("isologit.server")
_logged: set[str] = set()


class _First(FailFast):
    """pydantic's mark, made hashable so that it can stand in a union."""

    __hash__ = object.__hash__


# NOTE: a list with a million mistakes is refused for the first; telling all of them takes seconds and gigabytes.
ListOf = Annotated[list[T], _First()]


class FieldError(RequestError):
    """A field of the body asks for what is not done here; `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Refused:
    """A field that would change the answer. `neutral`: values, beside null, that ask for nothing."""

    neutral: tuple[Any, ...] = ()
    instead: str = "leave it out"


@dataclass(frozen=True)
class Ignored:
    """A field without influence on the answer, and why that is so."""

    why: str


Table = Mapping[str, Refused | Ignored]
_EMPTY: tuple[Any, ...] = ("", [], {})
_STRUCTURED = Refused(instead="output is not constrained here; check it, or use another server")
_BOOKKEEPING = Ignored("it is for the caller's own records")

_OPENAI: Table = {
    "use_beam_search": Refused((False,)),
    "length_penalty": Refused((1, 1.0), "it belongs to beam search, which is not done"),
    "skip_special_tokens": Refused((True,), "special tokens have no text here"),
    "spaces_between_special_tokens": Ignored("special tokens have no text"),
    "structured_outputs": _STRUCTURED,
    "structural_tag": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "guided_decoding_backend": Ignored("nothing is guided; the other guided_ fields are refused"),
    "guided_whitespace_pattern": Ignored("nothing is guided; the other guided_ fields are refused"),
    "response_format": Refused(({"type": "text"},), _STRUCTURED.instead),
    "logits_processors": Refused(_EMPTY),
    "priority": Refused((0,), "waiting requests go longest first"),
    "cache_salt": Refused(instead="all requests share beginnings; start the server with --no-enable-prefix-caching"),
    "kv_transfer_params": Refused(_EMPTY),
    "vllm_xargs": Refused(_EMPTY),
    "repetition_detection": Refused(_EMPTY),
    "thinking_token_budget": Refused(),
    "request_id": _BOOKKEEPING,
    "user": _BOOKKEEPING,
}
COMPLETIONS: Table = {
    **_OPENAI,
    "suffix": Refused(_EMPTY),
    "prompt_embeds": Refused(_EMPTY, "give text or token ids in prompt"),
}
CHAT: Table = {
    **_OPENAI,
    "tools": Refused(_EMPTY, "tool calls are not read out of answers here"),
    "tool_choice": Refused(("none",), "tools are not supported"),
    "functions": Refused(_EMPTY, "tool calls are not read out of answers here"),
    "function_call": Refused(("none",), "functions are not supported"),
    "parallel_tool_calls": Ignored("tools are refused"),
    "chat_template": Refused(instead="only the model's own template is run"),
    "mm_processor_kwargs": Refused(_EMPTY, "messages are text here"),
    "media_io_kwargs": Refused(_EMPTY, "messages are text here"),
    "modalities": Refused((["text"], []), "answers are text here"),
    "audio": Refused(_EMPTY, "answers are text here"),
    "echo": Refused((False,), "use /v1/completions"),
    "reasoning_effort": Refused(instead="if the model's template reads it, send it in chat_template_kwargs"),
    "verbosity": Refused(instead="if the model's template reads it, send it in chat_template_kwargs"),
    "web_search_options": Refused(),
    "include_reasoning": Ignored("reasoning is not told from the rest of an answer"),
    "prediction": Ignored("it makes an answer faster, not another one"),
    "prompt_cache_key": Ignored("every beginning that prompts share is reused"),
    "prompt_cache_retention": Ignored("every beginning that prompts share is reused"),
    "service_tier": Ignored("there is one tier"),
    "store": Ignored("nothing is ever stored"),
    "metadata": _BOOKKEEPING,
    "safety_identifier": _BOOKKEEPING,
}
TGI: Table = {
    "frequency_penalty": Refused((0, 0.0), "TGI's is not OpenAI's; that one is at /v1/completions"),
    "typical_p": Refused((1, 1.0), "use top_p"),
    "watermark": Refused((False,)),
    "grammar": _STRUCTURED,
    "adapter_id": Refused(_EMPTY, "adapters are not loaded here"),
}
CONTEST: Table = {
    "details": Ignored("the contest's server answers null, too"),
    "decoder_input_details": Ignored("the contest's server answers the same without"),
    "top_n_tokens": Ignored("the contest's server answers the same without"),
    "truncate": Ignored("the contest's server never truncates"),
    "typical_p": Ignored("the contest's server never uses it"),
    "watermark": Ignored("the contest's server never uses it"),
    "topk_k": Ignored("the contest's load generator misspells top_k"),
}


class Body(BaseModel):
    """A body or a part of one; fields that it does not have are looked up in a table."""

    model_config = ConfigDict(extra="allow")

    def check_others(self, table: Table, http: Request) -> None:
        """Raises FieldError for a refused field; notes the ones that no protocol has."""
        for name, value in (self.model_extra or {}).items():
            rule = table.get(name)
            if rule is None:
                _warn(http, name)
            elif isinstance(rule, Refused) and not _is_neutral(value, rule):
                raise FieldError(name, f"{name} is not supported; {rule.instead}")


def _is_neutral(value: Any, rule: Refused) -> bool:
    return value is None or any(type(value) is type(neutral) and value == neutral for neutral in rule.neutral)


def _warn(http: Request, name: str) -> None:
    http.scope.setdefault(WARNINGS, []).append(name)
    if name not in _logged and len(_logged) < _MOST_LOGGED:
        _logged.add(name)
        # NOTE: a name is the client's text; what does not look like one stays out of the log, as prompts do
        shown = name if _PLAIN_NAME.fullmatch(name) else "(a name that is none)"
        _log.warning("a request has the unknown field %s; it is ignored", shown)


def warning(names: Sequence[str]) -> bytes:
    """The header's value for fields that nobody knows; ASCII whatever they are called."""
    shown = ", ".join(name if _PLAIN_NAME.fullmatch(name) else json.dumps(name[:40]) for name in names[:_MOST_SHOWN])
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return f"unknown fields were ignored: {shown}{more}".encode("ascii")
