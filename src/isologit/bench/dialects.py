"""The HTTP protocols a server may speak: where to post, what to post, and how to read what is streamed back.

Asks for greedy answers. Knows neither sockets nor clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from isologit.bench.streams import Message

# NOTE: any other reason fails the request. Servers report errors as reasons of their own behind a status of 200.
ENDED_AT_THE_LIMIT = "length"
_GOOD_REASONS = frozenset(
    {ENDED_AT_THE_LIMIT, "stop", "eos", "eos_token", "stop_sequence", "tool_calls", "function_call"}
)


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
    events_only: streams are server-sent events, and never bare lines of JSON.
    """

    endpoint: str
    body: Callable[[LoadRequest, str, bool], dict[str, Any]]
    read: Callable[[Any], Message]
    events_only: bool = True
    takes_token_ids: bool = False
    can_ignore_eos: bool = True


def _llm_serving_body(request: LoadRequest, model: str, ignore_eos: bool) -> dict[str, Any]:
    """Booleans are strings, as the contest's client sends them."""
    parameters = {"max_new_tokens": request.max_new_tokens, "do_sample": "False", "return_full_text": "True"}
    return {"inputs": request.prompt, "parameters": parameters}


def _read_llm_serving(value: Any) -> Message:
    data = value.get("data", value)
    inner = data[0] if isinstance(data, list) else data
    text, reason = _text(inner["generated_text"]), _reason(inner.get("finish_reason"))
    if reason is None:
        return Message(text=text, is_token=inner["generated_text"] is not None)
    return Message(
        final=True,
        finish_reason=reason,
        full_text=text,
        num_tokens=_count(inner.get("generated_tokens")),
        error=_bad_reason(reason, text),
    )


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
    return _read_openai(value, lambda choice: _text(choice["text"]))


def _read_chat(value: Any) -> Message:
    return _read_openai(value, lambda choice: _generated(choice["delta"] or {}))


def _generated(delta: Mapping[str, Any]) -> str:
    """Everything the model wrote: its reasoning, its answer, its refusal and its calls of tools.

    Servers in transit between two names send reasoning under both, so it counts once.
    """
    calls = [call.get("function") or {} for call in delta.get("tool_calls") or []]
    calls.append(delta.get("function_call") or {})
    written = [delta.get("reasoning") or delta.get("reasoning_content"), delta.get("content"), delta.get("refusal")]
    written += [call.get(name) for call in calls for name in ("name", "arguments")]
    return "".join(map(_text, written))


def _read_openai(value: Any, text_of: Callable[[Any], str]) -> Message:
    if value.get("error"):
        return Message(error=_error(value["error"]))
    usage, choices = value.get("usage") or {}, value["choices"] or []
    text = "".join(text_of(choice) for choice in choices)
    reasons = [reason for choice in choices if (reason := _reason(choice.get("finish_reason"))) is not None]
    reason = reasons[-1] if reasons else None
    return Message(
        text=text,
        is_token=bool(text),
        final=reason is not None,
        finish_reason=reason,
        num_tokens=_count(usage.get("completion_tokens")),
        num_prompt_tokens=_count(usage.get("prompt_tokens")),
        error=_bad_reason(reason, ""),
    )


def _tgi_body(request: LoadRequest, model: str, ignore_eos: bool) -> dict[str, Any]:
    parameters: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "do_sample": False, "details": True}
    if ignore_eos:
        parameters["ignore_eos_token"] = True
    return {"inputs": request.prompt, "parameters": parameters}


def _read_tgi(value: Any) -> Message:
    if value.get("error"):
        return Message(error=_error(value["error"]))
    token, full_text, details = value["token"], value.get("generated_text"), value.get("details") or {}
    reason = _reason(details.get("finish_reason"))
    return Message(
        text="" if token is None or token.get("special") else _text(token["text"]),
        is_token=token is not None,
        final=full_text is not None,
        finish_reason=reason,
        full_text=None if full_text is None else _text(full_text),
        num_tokens=_count(details.get("generated_tokens")),
        num_prompt_tokens=_count(details.get("input_length")),
        error=_bad_reason(reason, ""),
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
    """Null is a server's way of saying that there is none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _reason(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError("not a reason")
    return value


DIALECTS: Mapping[str, Dialect] = {
    "llm-serving": Dialect(
        "/models/{model}/generate_stream",
        _llm_serving_body,
        _read_llm_serving,
        events_only=False,
        can_ignore_eos=False,
    ),
    "openai": Dialect("/v1/completions", _completions_body, _read_completions, takes_token_ids=True),
    "openai-chat": Dialect("/v1/chat/completions", _chat_body, _read_chat),
    "tgi": Dialect("/generate_stream", _tgi_body, _read_tgi),
}
