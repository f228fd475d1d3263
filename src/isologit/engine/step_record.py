"""What one step did, for profiles and results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did and how long its parts took, in seconds; `start_s` and `end_s` count from the start of the run.

    execute_s: building the batch and the model's step. sample_s: choosing tokens beyond the model's own argmax.
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
