"""What a request asks for, what it gets back, and the state it has while it runs.

Knows nothing of tensors, blocks' contents or the order in which requests run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from enum import Enum
from numbers import Integral, Real
from typing import Any

import numpy as np

from isologit.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """How output tokens are chosen and when they end; names as in vLLM. The default is greedy.

    `stop` may be one string or several, and is kept as a tuple; it ends the output after the first `min_tokens` tokens,
    and the text before it, unless `include_stop_str_in_output`; a token of `stop_token_ids` ends the text alike.
    `top_k` 0 or -1 means the whole vocabulary; `logprobs` asks for that many most likely tokens beside the chosen one.
    Raises RequestError for bad values.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | SequenceABC[str] = ()
    stop_token_ids: SequenceABC[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    return_logits: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.max_tokens, 1), "max_tokens", "an integer of at least 1", self.max_tokens)
        _require(
            _is_int(self.min_tokens, 0) and self.min_tokens <= self.max_tokens,
            "min_tokens", f"an integer between 0 and max_tokens ({self.max_tokens})", self.min_tokens,
        )  # fmt: skip
        _require(
            _is_finite(self.temperature) and self.temperature >= 0,
            "temperature", "a finite number of at least 0 (0 is greedy)", self.temperature,
        )  # fmt: skip
        _require(_is_int(self.top_k, -1), "top_k", "an integer of at least 1, or 0 or -1 for all tokens", self.top_k)
        _require(_is_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(
            _is_finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty", "a finite number above 0", self.repetition_penalty,
        )  # fmt: skip
        _require(self.seed is None or _is_int(self.seed, 0), "seed", "None or an integer of at least 0", self.seed)
        _require(
            self.logprobs is None or _is_int(self.logprobs, 0),
            "logprobs", "None or an integer of at least 0", self.logprobs,
        )  # fmt: skip
        for name in ("include_stop_str_in_output", "ignore_eos", "return_logits"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        _require(
            isinstance(stops, SequenceABC) and all(isinstance(stop, str) and stop for stop in stops),
            "stop", "a non-empty string or a sequence of them", self.stop,
        )  # fmt: skip
        _require(
            isinstance(self.stop_token_ids, SequenceABC) and all(_is_int(token, 0) for token in self.stop_token_ids),
            "stop_token_ids", "a sequence of integers of at least 0", self.stop_token_ids,
        )  # fmt: skip
        object.__setattr__(self, "stop", tuple(stops))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _require(holds: bool, name: str, allowed: str, value: Any) -> None:
    if not holds:
        raise RequestError(f"{name} must be {allowed}, not {value!r}")


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and what to do with it.

    `capture` holds indices of output tokens (0 = the first) whose full logits row is kept. `replay_token_ids` forces
    the output while everything is still computed; it never ends early at an end-of-sequence token inside the record.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    replay_token_ids: list[int] | None = None
    capture: frozenset[int] = frozenset()


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds since the run began; None for what never happened."""

    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None


@dataclass
class RequestOutput:
    """What a request got. `finish_reason` is "stop", "length", "abort" or "error"."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: int | str | None
    logprobs: list[dict[int, float]] | None
    logits: np.ndarray | None  # float32 [n, vocab]
    captured: dict[int, np.ndarray]  # float32 [vocab] each
    metrics: RequestMetrics
    error: str | None


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Run-time state of one request. `num_computed_tokens` (keys and values in memory) chases `len(token_ids)`.

    NOTE: `block_ids` is filled once, at admission, for every token that will ever be computed, and never changes while
    the sequence runs.
    """

    request: GenerationRequest
    token_ids: list[int] = field(init=False)  # prompt, then accepted output
    num_prompt_tokens: int = field(init=False)
    max_total_tokens: int = field(init=False)  # prompt + longest possible output
    forced_tokens: list[int] | None = field(init=False)  # output to replay
    drafts_from: int = field(init=False)  # number of known tokens from which on drafts can be verified
    stop_ids: frozenset[int] = field(init=False, default=frozenset())  # token ids that end it; set by the scheduler
    num_computed_tokens: int = field(init=False, default=0)
    num_cached_tokens: int = field(init=False, default=0)  # prompt tokens found in the prefix cache
    num_registered_blocks: int = field(init=False, default=0)  # leading full blocks known to the prefix cache
    block_ids: list[int] = field(init=False, default_factory=list)
    status: SequenceStatus = field(init=False, default=SequenceStatus.WAITING)
    finish_reason: str | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)
    arrival_s: float = field(init=False, default=0.0)
    scheduled_s: float | None = field(init=False, default=None)
    first_token_s: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        request = self.request
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.forced_tokens = request.replay_token_ids
        params = request.params
        max_tokens = params.max_tokens
        if self.forced_tokens is not None:
            max_tokens = min(max_tokens, len(self.forced_tokens))
        self.max_total_tokens = self.num_prompt_tokens + max_tokens
        # NOTE: where the token is not the row's plain argmax (a draw, a penalty, a masked end of sequence), a draft
        # cannot be verified against the argmax.
        if self.forced_tokens is not None:
            self.drafts_from = self.num_prompt_tokens
        elif params.greedy and params.repetition_penalty == 1.0:
            self.drafts_from = self.num_prompt_tokens + params.min_tokens
        else:
            self.drafts_from = self.max_total_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the output so far."""
        return self.token_ids[self.num_prompt_tokens :]
