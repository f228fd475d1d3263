"""A foreign server's log-probabilities are the reference's: what stands in for a commitment where there is none."""

from __future__ import annotations

import numpy as np

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunEvidence, RunKind
from isologit.judge.wire import TOP_LOGPROBS

_PRINTED = 1e-3  # servers round what they print
_LEAST = 0.5  # of those asked for: tokens with the same text are one key, as parts of a character often are


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
                asked = TOP_LOGPROBS[case.spec.dialect]
                if len(given) < _LEAST * asked:
                    message = f"request {record.id} token {index}: {len(given)} log-probabilities of {asked} asked for"
                    return Finding("logprobs.few", message, run.run_id, record.id, index)
                values = np.sort(known[index])[::-1][: 2 * max(asked, len(given))].tolist()
                strange = _not_among(sorted(given.values(), reverse=True), values, allowed, max(0, asked - len(given)))
                if strange is not None:
                    message = (
                        f"request {record.id} token {index}: log-probability {strange:.4f} is not one of the "
                        f"reference's, which begin with {values[0]:.4f}; {allowed:g} is allowed"
                    )
                    return Finding("logprobs.differ", message, run.run_id, record.id, index)
        return None


def _not_among(given: list[float], values: list[float], allowed: float, absent: int) -> float | None:
    """The first of `given` that is not the next of `values`; both descend. absent: how many values may be left out."""
    place = 0
    for value in given:
        while place < len(values) and absent and values[place] - value > allowed:
            place, absent = place + 1, absent - 1
        if place == len(values) or not abs(values[place] - value) <= allowed:
            return value
        place += 1
    return None


AUDIT = Logprobs()
