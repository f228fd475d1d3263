"""Answers are the dialect's, to its last message: strict JSON, no error behind a status of 200, an end that says so."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunKind

_WORDS = {
    "json": "are not JSON (NaN, infinities and repeated keys are not)",
    "dialect": "are not the dialect's",
    "end": "ended without the dialect's last message",
    "size": "are larger than any answer can be",
}


class Stream:
    """What is read leniently could be misread."""

    name = "stream"
    title = "messages are strict and end as they should"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """The first answer of each kind of fault, in each run."""
        found = []
        for run in case.runs:
            if run.client_problem_code in _WORDS:
                found.append(Finding(f"stream.{run.client_problem_code}", str(run.client_problem), run.run_id))
            for code, words in _WORDS.items():
                bad = [record for record in run.records if record.error_code == code]
                if bad:
                    message = f"{len(bad)} answers {words}; the first, request {bad[0].id}: {bad[0].error}"
                    found.append(Finding(f"stream.{code}", message, run.run_id, bad[0].id))
        return found


AUDIT = Stream()
