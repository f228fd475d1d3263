"""What a request asks for, what it gets back, and the state it has while it runs.

Knows nothing of tensors, blocks' contents or the order in which requests run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from isologit.engine.sampling_params import SamplingParams

__all__ = ["GenerationRequest", "RequestMetrics", "RequestOutput", "SamplingParams", "Sequence", "SequenceStatus"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and what to do with it.

    `capture` holds indices of output tokens (0 = the first) whose full logits row is kept. `replay_token_ids` forces
    the output while everything is still computed; it never ends early at an end-of-sequence token inside the record.
    `is_continued`: the output's text is to stand behind the prompt's, so it keeps the space that it may begin with.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    replay_token_ids: list[int] | None = None
    capture: frozenset[int] = frozenset()
    is_continued: bool = False


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds since the run began; None for what never happened."""

    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None


@dataclass
class RequestOutput:
    """What a request got.

    finish_reason: "stop", "length", "abort" or "error", which `error` explains. logprobs: one entry for each output
    token. prompt_logprobs: one for each prompt token, None for the first, which nothing predicts.
    """

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
    prompt_logprobs: list[dict[int, float] | None] | None = None


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
    argmax_from: int = field(init=False)  # number of known tokens from which on the next is the row's plain argmax
    is_watched: bool = field(init=False)  # whether its tokens are looked at as they come, or its rows are kept
    needs_logits: bool = field(init=False)  # whether any step must give its logits, beyond the index of the largest
    stop_ids: frozenset[int] = field(init=False, default=frozenset())  # token ids that end it; set by the scheduler
    num_computed_tokens: int = field(init=False, default=0)
    num_cached_tokens: int = field(init=False, default=0)  # prompt tokens found in the prefix cache
    num_registered_blocks: int = field(init=False, default=0)  # leading full blocks known to the prefix cache
    block_ids: list[int] = field(init=False, default_factory=list)
    status: SequenceStatus = field(init=False, default=SequenceStatus.WAITING)
    finish_reason: str | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)
    error: str | None = field(init=False, default=None)
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
        keeps_rows = bool(request.capture) or params.return_logits or params.logprobs is not None
        self.is_watched = bool(params.stop) or keeps_rows
        # NOTE: where the token is not the row's plain argmax (a draw, a penalty, a masked end of sequence), a draft
        # cannot be verified against the argmax.
        if self.forced_tokens is not None:
            self.argmax_from = self.num_prompt_tokens
        elif params.greedy and not params.adjusts_logits:
            self.argmax_from = self.num_prompt_tokens + params.min_tokens
        else:
            self.argmax_from = self.max_total_tokens
        gives_logits = self.scores_prompt or params.return_logits or params.logprobs is not None
        self.needs_logits = gives_logits or self.argmax_from > self.num_prompt_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are wanted, for which all of it must be computed."""
        return self.request.params.prompt_logprobs is not None

    @property
    def needs_row(self) -> bool:
        """Whether the next token is chosen from its row of logits, as the row's argmax is not enough."""
        return len(self.token_ids) < self.argmax_from

    @property
    def generates(self) -> bool:
        """Whether it can have any output."""
        return self.max_total_tokens > self.num_prompt_tokens

    @property
    def num_to_compute(self) -> int:
        """Known tokens that something follows from: all, but the last of a prompt that generates nothing."""
        return len(self.token_ids) if self.generates else self.num_prompt_tokens - 1

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the output so far."""
        return self.token_ids[self.num_prompt_tokens :]
