"""What one step did, for profiles and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from isologit.engine.scheduler import StepPlan


class Moments(NamedTuple):
    """When a step began and when each of its parts was over, in seconds since the run began."""

    start_s: float
    scheduled_s: float
    executed_s: float
    sampled_s: float
    committed_s: float
    filed_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did and how long its parts took, in seconds; `start_s` and `end_s` count from the start of the run.

    schedule_s, execute_s: scheduling; building the batch and the model's step. Where steps overlap, that is scheduling
    and building the next step, and waiting for this one. sample_s: choosing tokens beyond the model's own argmax.
    capture_s: text, and keeping what the request asked for; the rows that are captured are made in a product, which is
    the model's time.
    """

    start_s: float
    end_s: float
    schedule_s: float
    execute_s: float
    sample_s: float
    capture_s: float
    num_tokens: int
    num_logits: int
    num_seqs: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @classmethod
    def of(cls, plan: StepPlan, num_logits: int, at: Moments) -> StepRecord:
        """Of a plan that was committed, whose step computed so many rows of logits."""
        drafted = [entry for entry in plan.sequences if entry.draft_token_ids]
        return cls(
            start_s=at.start_s,
            end_s=at.end_s,
            schedule_s=at.scheduled_s - at.start_s,
            execute_s=at.executed_s - at.scheduled_s,
            sample_s=at.sampled_s - at.executed_s,
            capture_s=at.filed_s - at.committed_s,
            num_tokens=plan.num_tokens,
            num_logits=num_logits,
            num_seqs=len(plan.sequences),
            num_draft_tokens=sum(len(entry.draft_token_ids) for entry in drafted),
            num_accepted_tokens=sum(max(0, entry.num_accepted - 1) for entry in drafted),
        )
