"""What a load run was to send, and what became of every request. Knows no socket, no clock and no metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from isologit.bench.arrivals import Seconds
from isologit.bench.dialects import Dialect, LoadRequest

Status = Literal["pending", "completed", "failed", "unsent"]


@dataclass(frozen=True)
class LoadPlan:
    """What to send where and when.

    url: where requests are posted. arrival_s: ascending seconds [n] after the start. `max_concurrency` holds requests
    back on this side while that many are being answered; None is an open loop. request_timeout_s: a request that is not
    answered whole so many seconds after it was sent has failed.
    """

    url: str
    dialect: Dialect
    model: str
    requests: Sequence[LoadRequest]
    arrival_s: Seconds
    max_concurrency: int | None = None
    ignore_eos: bool = False
    request_timeout_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class RequestRecord:
    """What became of one request; times are seconds since the first scheduled time, None for what never happened.

    scheduled_s: when it was due. dispatched_s: when this program got to it. sent_s: when it was sent, later than that
    only under `max_concurrency`. token_times_s: arrival of every message that carried a token. finished_s: end of the
    answer, or of the failure. reported_*: the server's own counts.
    """

    request: LoadRequest
    scheduled_s: float
    dispatched_s: float | None = None
    sent_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    finished_s: float | None = None
    status: Status = "pending"
    text: str = ""
    finish_reason: str | None = None
    reported_tokens: int | None = None
    reported_prompt_tokens: int | None = None
    error: str | None = None

    @property
    def first_token_s(self) -> float | None:
        """When the answer began; an answer without any token begins at its end."""
        return self.token_times_s[0] if self.token_times_s else self.finished_s


@dataclass(frozen=True)
class LoadRun:
    """Every request of the plan with what became of it, in the plan's order.

    duration_s: from the first scheduled time to the last answer. started_at: seconds since the epoch. interrupted: by
    a signal, which cut off what was being answered and left the rest unsent.
    """

    plan: LoadPlan
    records: list[RequestRecord]
    started_at: float
    duration_s: float
    server_gone: bool
    interrupted: bool = False
