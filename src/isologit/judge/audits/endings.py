"""An answer ends with EOS or at its length, nowhere else, and not beyond."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RequestEvidence, RunKind


class Endings:
    """As the contest's rule: EOS or `max_new_tokens` ends a request."""

    name = "endings"
    title = "answers end where the model ends them"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Answers that were cut, go on after EOS, or are longer than asked."""
        found = []
        for run in case.runs:
            ends = case.reference_of(run).eos_token_ids
            for record in run.records:
                if record.status == "completed" and (problem := _problem(record, ends)) is not None:
                    code, message = problem
                    found.append(Finding(f"endings.{code}", f"request {record.id}: {message}", run.run_id, record.id))
                    break
        return found


def _problem(record: RequestEvidence, eos_token_ids: tuple[int, ...]) -> tuple[str, str] | None:
    tokens, limit = record.token_ids, record.max_tokens
    if record.reported_tokens is not None and record.reported_tokens != len(tokens):
        return "count", f"{len(tokens)} tokens were streamed, {record.reported_tokens} reported"
    early = next((i for i, token in enumerate(tokens[:-1]) if token in eos_token_ids), None)
    if early is not None:
        return "after_eos", f"token {early} is EOS, and {len(tokens) - early - 1} tokens follow"
    if len(tokens) > limit:
        return "too_long", f"{len(tokens)} tokens, {limit} were asked for"
    if len(tokens) < limit and (not tokens or tokens[-1] not in eos_token_ids):
        return "cut", f"ends after {len(tokens)} of {limit} tokens without EOS"
    return None


AUDIT = Endings()
