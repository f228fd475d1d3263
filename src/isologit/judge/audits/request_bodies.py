"""An answer does not depend on what else a request asks for."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunKind


class RequestBodies:
    """All requests of a kind have the same fields, and asking for log-probabilities changes no token."""

    name = "request_bodies"
    title = "an answer is the same whether or not it is looked at"
    runs: tuple[RunKind, ...] = ("timed", "probed")

    def verify(self, case: Case) -> list[Finding]:
        """Tokens that differ between requests with and without log-probabilities."""
        known = {(r.prompt, r.max_tokens): r.token_ids for run in case.of("timed") for r in case.answers(run)}
        differ = [
            (run.run_id, record.id)
            for run in case.of("probed")
            for record in case.answers(run)
            if known.get((record.prompt, record.max_tokens), record.token_ids) != record.token_ids
        ]
        if not differ:
            return []
        run_id, name = differ[0]
        message = f"{len(differ)} answers are others when log-probabilities are asked for; the first is request {name}"
        return [Finding("request_bodies.differ", message, run_id, name)]


AUDIT = RequestBodies()
