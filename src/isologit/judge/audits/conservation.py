"""Every request that was sent has one answer, to the end; a failure never shortens a time."""

from __future__ import annotations

from collections import Counter

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunKind


class Conservation:
    """Issued is completed, each id once."""

    name = "conservation"
    title = "every request is answered, once and to the end"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Requests that failed, have no answer, or come twice."""
        found = []
        for run in case.runs:
            if run.client_problem is not None:
                found.append(
                    Finding("conservation.no_load", f"the run has no result: {run.client_problem}", run.run_id)
                )
                continue
            twice = [name for name, count in Counter(r.id for r in run.records).items() if count > 1]
            if twice:
                found.append(
                    Finding("conservation.twice", f"request {twice[0]} is recorded twice", run.run_id, twice[0])
                )
            lost = [r for r in run.records if r.status != "completed"]
            if lost:
                found.append(
                    Finding(
                        "conservation.failed",
                        f"{len(lost)} of {len(run.records)} requests failed; the first, {lost[0].id}: {lost[0].error}",
                        run.run_id,
                        lost[0].id,
                    )
                )
            if run.process.died:
                found.append(Finding("conservation.died", "the entry's process ended during the run", run.run_id))
        return found


AUDIT = Conservation()
