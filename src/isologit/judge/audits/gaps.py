"""Tokens are streamed as they are made; an answer that comes at once at its end was held back."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RequestEvidence, RunKind

_LEAST_TOKENS = 8
_AT_ONCE_S = 1e-3
_SHARE = 0.5


class Gaps:
    """Times to the first token and between tokens mean something only if tokens are sent when they exist."""

    name = "gaps"
    title = "tokens are streamed as they are made"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Runs in which half of the longer answers arrived in one piece."""
        found = []
        for run in case.runs:
            longer = [record for record in case.answers(run) if len(record.token_ids) >= _LEAST_TOKENS]
            at_once = [record for record in longer if _at_once(record)]
            if longer and len(at_once) > _SHARE * len(longer):
                message = (
                    f"{len(at_once)} of {len(longer)} answers of {_LEAST_TOKENS} tokens and more arrived in one piece; "
                    f"the first is request {at_once[0].id}"
                )
                found.append(Finding("gaps.at_once", message, run.run_id, at_once[0].id))
        return found


def _at_once(record: RequestEvidence) -> bool:
    seconds = [second for second, _ in record.arrivals]
    return not seconds or seconds[-1] - seconds[0] <= _AT_ONCE_S


AUDIT = Gaps()
