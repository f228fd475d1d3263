"""Tokens are streamed as they are made; an answer that comes at once at its end was held back."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RequestEvidence, RunEvidence, RunKind

_LEAST_TOKENS = 8
_LEAST_ANSWERS = 4
_AT_ONCE = 0.02  # of the time that the answer's tokens take to be made
_SHARE = 0.5
_SHORT_S = 0.02
_LAGS = 1.5


class Gaps:
    """Times to the first token and between tokens mean something only if tokens are sent when they exist.

    How long a token takes is known from the run's quickest answer, from its sending to its end. An answer whose tokens
    all came within a fiftieth of what so many take was held back. It says nothing of answers that are made about as
    fast as this judge can read: on a busy machine it may itself have been late, and it knows by how much.
    """

    name = "gaps"
    title = "tokens are streamed as they are made"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Runs in which half of the longer answers arrived in one piece."""
        found = []
        for run in case.runs:
            longer = [record for record in case.completed(run) if len(record.token_ids) >= _LEAST_TOKENS]
            at_once = _held_back(run, longer)
            if len(longer) >= _LEAST_ANSWERS and len(at_once) > _SHARE * len(longer):
                message = (
                    f"{len(at_once)} of {len(longer)} answers of {_LEAST_TOKENS} tokens and more arrived in one piece; "
                    f"the first is request {at_once[0].id}"
                )
                found.append(Finding("gaps.at_once", message, run.run_id, at_once[0].id))
        return found


def _held_back(run: RunEvidence, answers: list[RequestEvidence]) -> list[RequestEvidence]:
    token_s = min((_seconds(record) / len(record.token_ids) for record in answers), default=0.0)
    least_s = _SHORT_S + _LAGS * (run.client_lag_s or 0.0)
    found = []
    for record in answers:
        made_s = token_s * (len(record.token_ids) - 1)
        came_s = record.arrivals[-1][0] - record.arrivals[0][0] if record.arrivals else 0.0
        if made_s >= least_s and came_s <= _AT_ONCE * made_s:
            found.append(record)
    return found


def _seconds(record: RequestEvidence) -> float:
    return (record.finished_s or 0.0) - (record.sent_s or 0.0)


AUDIT = Gaps()
