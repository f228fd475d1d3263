"""A foreign server's log-probabilities are the reference's: what stands in for a commitment where there is none."""

from __future__ import annotations

import numpy as np

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunEvidence, RunKind

_CANDIDATES = 64  # most likely tokens of the reference among which a text is looked for
_PRINTED = 1e-3  # servers round what they print


class Logprobs:
    """The most likely tokens of each row, in the timed stream. Nothing of the rest of the row is seen."""

    name = "logprobs"
    title = "log-probabilities in the timed stream are the reference's"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """The first token of each run whose log-probabilities are off by more than the tolerance allows, or missing."""
        return [finding for run in case.runs if (finding := self._of_run(case, run)) is not None]

    def _of_run(self, case: Case, run: RunEvidence) -> Finding | None:
        reference = case.reference_of(run)
        allowed = 2 * case.profile.tolerance + _PRINTED  # a logit and the normaliser may each be off
        for record in case.answers(run):
            if len(record.top_logprobs) < len(record.token_ids):
                counts = f"{len(record.token_ids)} tokens, {len(record.top_logprobs)} log-probabilities"
                return Finding("logprobs.missing", f"request {record.id}: {counts}", run.run_id, record.id)
            logits = reference.logits(reference.hidden(record.prompt, record.token_ids)).astype(np.float64)
            known = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
            known -= logits.max(axis=1, keepdims=True)
            for index, given in enumerate(record.top_logprobs[: len(record.token_ids)]):
                best = np.argsort(-known[index])[: max(_CANDIDATES, len(given))]
                values = np.sort(known[index][best])[::-1]
                for place, value in enumerate(sorted(given.values(), reverse=True)):
                    if abs(value - values[place]) > allowed:
                        message = (
                            f"request {record.id} token {index}: log-probability {place + 1} is {value:.4f}, the "
                            f"reference's is {values[place]:.4f}; {allowed:g} is allowed"
                        )
                        return Finding("logprobs.differ", message, run.run_id, record.id, index)
        return None


AUDIT = Logprobs()
