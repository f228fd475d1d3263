"""What the judge says to an entry and how it reads the answers, in the three dialects.

Every request of a round has the same fields: an entry cannot tell a checked request from another. Owns bodies and
messages; knows neither sockets nor clocks.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isologit.common.commitment import COMMITMENT_BYTES, FINGERPRINT_SIZE

ROUND_PATH = "/judge/round"
REVEAL_PATH = "/judge/reveal"
REQUEST_ID_HEADER = "X-Request-Id"
TOP_LOGPROBS = {"openai": 20, "tgi": 5, "llm-serving": 0}  # of a foreign server: what stands in for a commitment


class WireError(ValueError):
    """A message of an entry is not what its dialect says."""


@dataclass
class Answer:
    """What one streamed answer says, message by message. `ended`: the dialect's last message was seen.

    top_logprobs: for each token its log-probability and those of the most likely ones, by token text.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    fingerprints: list[bytes] = field(default_factory=list)
    commitments: list[bytes] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    finish_reason: str | None = None
    reported_tokens: int | None = None
    ended: bool = False


@dataclass(frozen=True)
class JudgeDialect:
    """How one kind of server is spoken to.

    path: where requests go, with `{model}`. body: of (model, prompt, max_tokens, whether to ask for log-probabilities).
    read: adds one JSON value to an answer and gives its number of tokens; raises WireError, TypeError or a LookupError.
    """

    path: str
    body: Callable[[str, str, int, bool], dict[str, Any]]
    read: Callable[[Any, Answer], int]


def _openai_body(model: str, prompt: str, max_tokens: int, logprobs: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    return {**body, "logprobs": TOP_LOGPROBS["openai"]} if logprobs else body


def _read_openai(value: Any, answer: Answer) -> int:
    if "error" in value:
        raise WireError(f"the server reported an error: {_short(value['error'])}")
    if value.get("usage"):
        answer.reported_tokens = _count(value["usage"]["completion_tokens"])
    if not value["choices"]:
        return 0
    choice = value["choices"][0]
    if answer.finish_reason is not None:
        raise WireError("a choice follows the last one")
    answer.text += _text(choice["text"])
    ids = [_count(token) for token in choice.get("token_ids") or []]
    logprobs = choice.get("logprobs")
    if logprobs is not None and logprobs.get("top_logprobs"):
        for listed in logprobs["top_logprobs"]:
            answer.top_logprobs.append({_text(text): _number(number) for text, number in (listed or {}).items()})
        if not ids:
            ids = [-1] * len(logprobs["top_logprobs"])
    reason = choice.get("finish_reason")
    answer.finish_reason = None if reason is None else _text(reason)
    return _add_tokens(value, ids, answer)


def _contest_body(model: str, prompt: str, max_tokens: int, logprobs: bool) -> dict[str, Any]:
    parameters = {"max_new_tokens": max_tokens, "do_sample": "False", "return_full_text": "True"}
    return {"inputs": prompt, "parameters": parameters}


def _read_contest(value: Any, answer: Answer) -> int:
    data = value.get("data", value)
    inner = data[0] if isinstance(data, list) else data
    if "finish_reason" in inner:
        answer.text = _text(inner["generated_text"])
        answer.finish_reason = _text(inner["finish_reason"])
        answer.reported_tokens = _count(inner["generated_tokens"])
        answer.ended = True
        return 0
    token = inner["tokens"]
    return _add_tokens(inner, [_count(token["id"])], answer)


def _tgi_body(model: str, prompt: str, max_tokens: int, logprobs: bool) -> dict[str, Any]:
    parameters: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": False, "details": True}
    if logprobs:
        parameters["top_n_tokens"] = TOP_LOGPROBS["tgi"]
    return {"inputs": prompt, "parameters": parameters}


def _read_tgi(value: Any, answer: Answer) -> int:
    if "error" in value:
        raise WireError(f"the server reported an error: {_short(value['error'])}")
    token = value["token"]
    if value.get("generated_text") is not None:
        answer.text = _text(value["generated_text"])
        answer.finish_reason = _text(value["details"]["finish_reason"])
        answer.reported_tokens = _count(value["details"]["generated_tokens"])
        answer.ended = True
    if value.get("top_tokens"):
        answer.top_logprobs.append({_text(t["text"]): _number(t["logprob"]) for t in value["top_tokens"]})
    return _add_tokens(value, [_count(token["id"])], answer)


DIALECTS: dict[str, JudgeDialect] = {
    "openai": JudgeDialect("/v1/completions", _openai_body, _read_openai),
    "llm-serving": JudgeDialect("/models/{model}/generate_stream", _contest_body, _read_contest),
    "tgi": JudgeDialect("/generate_stream", _tgi_body, _read_tgi),
}


def commit_message(fingerprints: np.ndarray, commitments: list[bytes]) -> list[dict[str, str]]:
    """The `commit` member of a stream message: fingerprints float32 [n, 16] of its tokens, and their commitments."""
    return [
        {
            "fingerprint": base64.b64encode(np.ascontiguousarray(row, "<f4").tobytes()).decode(),
            "commitment": base64.b64encode(promise).decode(),
        }
        for row, promise in zip(fingerprints, commitments, strict=True)
    ]


def _add_tokens(value: Any, ids: list[int], answer: Answer) -> int:
    answer.token_ids += ids
    commits = value.get("commit") or []
    if commits and len(commits) != len(ids):
        # NOTE: otherwise tokens could be streamed first and computed as they should be afterwards.
        raise WireError(f"{len(commits)} commitments in a message of {len(ids)} tokens; each commits to its own")
    for item in commits:
        answer.fingerprints.append(_bytes(item["fingerprint"], 4 * FINGERPRINT_SIZE))
        answer.commitments.append(_bytes(item["commitment"], COMMITMENT_BYTES))
    return len(ids)


def _bytes(text: Any, size: int) -> bytes:
    try:
        found = base64.b64decode(_text(text), validate=True)
    except binascii.Error as error:
        raise WireError(f"not base64: {error}") from None
    if len(found) != size:
        raise WireError(f"{len(found)} bytes instead of {size}")
    return found


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise WireError(f"not a number of tokens or a token id: {_short(value)}")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise WireError(f"not a number: {_short(value)}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise WireError(f"not text: {_short(value)}")
    return value


def _short(value: Any) -> str:
    return repr(value)[:200]
