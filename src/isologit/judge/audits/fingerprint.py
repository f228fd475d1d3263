"""The vector behind every streamed token is the reference's, within what the tolerance allows."""

from __future__ import annotations

import numpy as np

from isologit.common.commitment import fingerprint_matrix, fingerprints
from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RequestEvidence, RunEvidence, RunKind

TOKEN_FACTOR = 4.0
"""A single token is accused from this multiple of the tolerance on: sixteen numbers know a distance within a factor of
about 1.7, so an honest token stays below."""
MEAN_FACTOR = 2.0
"""Of the root mean square over all tokens of a run, which is known within a few percent."""
_LEAST_TOKENS = 200


def expected_differences(case: Case, run: RunEvidence, record: RequestEvidence) -> np.ndarray:
    """float64 [n]: the largest logit difference that each token's fingerprint speaks of."""
    reference = case.reference_of(run)
    matrix = fingerprint_matrix(bytes.fromhex(run.nonce), reference.hidden_size)
    theirs = fingerprints(matrix, reference.hidden(record.prompt, record.token_ids))
    return reference.scale.expected_max_difference(record.fingerprint_rows(), theirs)


class Fingerprint:
    """Every token of every run, so that nothing can be exact only where it is looked at."""

    name = "fingerprint"
    title = "the arithmetic of every timed token is the reference's"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Runs with tokens whose fingerprints are too far off, alone or on average."""
        return [finding for run in case.runs if run.commit and (finding := self._of_run(case, run)) is not None]

    def _of_run(self, case: Case, run: RunEvidence) -> Finding | None:
        tolerance, found = case.profile.tolerance, []
        worst: tuple[float, str, int] = (0.0, "", 0)
        over = 0
        for record in case.answers(run):
            if len(record.fingerprints) != len(record.token_ids):
                message = (
                    f"request {record.id}: {len(record.token_ids)} tokens, {len(record.fingerprints)} fingerprints"
                )
                return Finding("fingerprint.missing", message, run.run_id, record.id)
            expected = expected_differences(case, run, record)
            found.append(np.minimum(expected, 1e6))
            over += int((expected > TOKEN_FACTOR * tolerance).sum())
            index = int(expected.argmax())
            worst = max(worst, (float(expected[index]), record.id, index))
        if not found:
            return None
        values = np.concatenate(found)
        mean = float(np.sqrt((values**2).mean()))
        if over:
            message = (
                f"{over} of {len(values)} tokens come from other arithmetic than the model's: by their fingerprints, "
                f"logits are off by up to {worst[0]:.3g}, {tolerance:g} is allowed; the worst is request {worst[1]} "
                f"token {worst[2]}"
            )
            return Finding("fingerprint.token", message, run.run_id, worst[1], worst[2])
        if len(values) >= _LEAST_TOKENS and mean > MEAN_FACTOR * tolerance:
            message = (
                f"{len(values)} tokens come from other arithmetic than the model's: by their fingerprints, logits are "
                f"off by up to {mean:.3g} on average, {tolerance:g} is allowed"
            )
            return Finding("fingerprint.mean", message, run.run_id)
        return None


AUDIT = Fingerprint()
