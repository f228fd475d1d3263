"""The HTTP protocols a server may speak: where to post, what to post, and how to read what is streamed back.

Asks for greedy answers. Knows neither sockets nor clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from isologit.bench.streams import Message

# NOTE: any other reason fails the request. Servers report errors as reasons of their own behind a status of 200.
_GOOD_REASONS = frozenset({"stop", "length", "eos", "eos_token", "stop_sequence"})


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request to send: its text, or its token ids where the dialect takes them.

    `prompt_len` counts prompt tokens and is None when no tokenizer is known.
    """

    id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_len: int | None
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one kind of server is spoken to.

    endpoint: path with `{model}` where the model's name belongs. body: JSON body of `(request, model, ignore_eos)`.
    read: message of one streamed JSON value; raises ValueError, TypeError or a LookupError when it is no such value.
    """

    endpoint: str
    body: Callable[[LoadRequest, str, bool], dict[str, Any]]
    read: Callable[[Any], Message]
    takes_token_ids: bool = False
    can_ignore_eos: bool = True


def _llm_serving_body(request: LoadRequest, model: str, ignore_eos: bool) -> dict[str, Any]:
    """Booleans are strings, as the contest's client sends them."""
    parameters = {"max_new_tokens": request.max_new_tokens, "do_sample": "False", "return_full_text": "True"}
    return {"inputs": request.prompt, "parameters": parameters}


def _read_llm_serving(value: Any) -> Message:
    data = value.get("data", value)
    inner = data[0] if isinstance(data, list) else data
    text = _text(inner["generated_text"])
    if "finish_reason" not in inner:
        return Message(text=text, is_token=True)
    return _final(text, inner["finish_reason"], inner.get("generated_tokens"), error_text=text)


def _completions_body(request: LoadRequest, model: str, ignore_eos: bool) -> dict[str, Any]:
    prompt = request.prompt_token_ids if request.prompt is None else request.prompt
    return {"prompt": prompt, "max_tokens": request.max_new_tokens, **_openai_body(model, ignore_eos)}


def _chat_body(request: LoadRequest, model: str, ignore_eos: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": request.prompt}]
    return {
        "messages": messages,
        "max_completion_tokens": request.max_new_tokens,
        **_openai_body(model, ignore_eos),
    }


def _openai_body(model: str, ignore_eos: bool) -> dict[str, Any]:
    body = {"model": model, "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
    return {**body, "ignore_eos": True} if ignore_eos else body


def _read_completions(value: Any) -> Message:
    return _read_openai(value, lambda choice: choice["text"])


def _read_chat(value: Any) -> Message:
    return _read_openai(value, lambda choice: choice["delta"].get("content") or "")


def _read_openai(value: Any, text_of: Callable[[Any], Any]) -> Message:
    if "error" in value:
        return Message(error=_error(value["error"]))
    usage = value.get("usage")
    num_tokens = _count(usage["completion_tokens"]) if usage else None
    if not value["choices"]:
        return Message(num_tokens=num_tokens)
    choice = value["choices"][0]
    text, reason = _text(text_of(choice)), choice.get("finish_reason")
    return Message(
        text=text,
        is_token=bool(text),
        final=reason is not None,
        finish_reason=reason,
        num_tokens=num_tokens,
        error=_bad_reason(reason, ""),
    )


def _tgi_body(request: LoadRequest, model: str, ignore_eos: bool) -> dict[str, Any]:
    parameters: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "do_sample": False, "details": True}
    if ignore_eos:
        parameters["ignore_eos_token"] = True
    return {"inputs": request.prompt, "parameters": parameters}


def _read_tgi(value: Any) -> Message:
    if "error" in value:
        return Message(error=_error(value["error"]))
    token = value["token"]
    text = "" if token.get("special") else _text(token["text"])
    full_text = value.get("generated_text")
    if full_text is None:
        return Message(text=text, is_token=True)
    details = value.get("details") or {}
    final = _final(_text(full_text), details.get("finish_reason"), details.get("generated_tokens"), error_text="")
    return Message(
        text=text,
        is_token=True,
        final=True,
        finish_reason=final.finish_reason,
        full_text=final.full_text,
        num_tokens=final.num_tokens,
        error=final.error,
    )


def _final(full_text: str, reason: str | None, num_tokens: Any, *, error_text: str) -> Message:
    return Message(
        final=True,
        finish_reason=reason,
        full_text=full_text,
        num_tokens=_count(num_tokens),
        error=_bad_reason(reason, error_text),
    )


def _bad_reason(reason: str | None, text: str) -> str | None:
    if reason is None or reason in _GOOD_REASONS:
        return None
    return f"the server ended the answer with {reason!r}" + (f": {text}" if text else "")


def _error(error: Any) -> str:
    message = error.get("message", error) if isinstance(error, Mapping) else error
    return f"the server reported an error: {message}"


def _count(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise TypeError("not a number of tokens")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


DIALECTS: Mapping[str, Dialect] = {
    "llm-serving": Dialect(
        "/models/{model}/generate_stream", _llm_serving_body, _read_llm_serving, can_ignore_eos=False
    ),
    "openai": Dialect("/v1/completions", _completions_body, _read_completions, takes_token_ids=True),
    "openai-chat": Dialect("/v1/chat/completions", _chat_body, _read_chat),
    "tgi": Dialect("/generate_stream", _tgi_body, _read_tgi),
}
