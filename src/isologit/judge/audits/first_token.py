"""What arrives first is the answer's first token, so that the time to it cannot be bought with anything else."""

from __future__ import annotations

import numpy as np

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunKind


class FirstToken:
    """MLPerf's TEST06 asks the same."""

    name = "first_token"
    title = "the first token streamed is the answer's first"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """The first request of a run whose first token is not the reference's."""
        found = []
        for run in case.runs:
            reference = case.reference_of(run)
            for record in case.answers(run):
                token = record.token_ids[0]
                logits = reference.logits(reference.hidden(record.prompt, record.token_ids[:1]))[0]
                if (
                    0 <= token < len(logits)
                    and float(np.max(logits)) - float(logits[token]) <= 2 * case.profile.tolerance
                ):
                    continue
                message = f"request {record.id}: its first token, {token}, is not the one the model begins with"
                found.append(Finding("first_token.other", message, run.run_id, record.id, 0))
                break
        return found


AUDIT = FirstToken()
