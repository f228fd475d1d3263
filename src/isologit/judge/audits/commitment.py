"""Rows revealed after the stream are the ones committed to in it, and their logits are within the tolerance."""

from __future__ import annotations

import base64

import numpy as np

from isologit.common.commitment import commitment, fingerprint_matrix, fingerprints
from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RequestEvidence, RevealedRow, RunEvidence, RunKind

_FINGERPRINT_SLACK = 1e-4  # relative: both sides multiply the same row, in another order


class Commitment:
    """What was timed is what is shown: times one thing and shows another is found by the hash."""

    name = "commitment"
    title = "rows shown afterwards are those of the timed stream, and exact"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """The first revealed row of each run that does not hold."""
        found = []
        for run in case.runs:
            if run.commit and run.client_problem is None and (finding := self._of_run(case, run)) is not None:
                found.append(finding)
        return found

    def _of_run(self, case: Case, run: RunEvidence) -> Finding | None:
        if run.reveal_problem is not None:
            return Finding(
                "commitment.not_revealed", f"the entry did not reveal its rows: {run.reveal_problem}", run.run_id
            )
        given = {(row.request_id, row.index): row for row in run.revealed}
        records = {record.id: record for record in run.records}
        for name, index in run.positions:
            row = given.get((name, index))
            if row is None:
                return Finding(
                    "commitment.missing", f"request {name} token {index} was not revealed", run.run_id, name, index
                )
            problem = self._problem(case, run, records[name], row)
            if problem is not None:
                code, message = problem
                return Finding(
                    f"commitment.{code}", f"request {name} token {index}: {message}", run.run_id, name, index
                )
        return None

    def _problem(
        self, case: Case, run: RunEvidence, record: RequestEvidence, revealed: RevealedRow
    ) -> tuple[str, str] | None:
        reference, nonce, index = case.reference_of(run), bytes.fromhex(run.nonce), revealed.index
        try:
            row = revealed.row()
        except ValueError:
            return "shape", "the row is not a float32 vector"
        if row.shape != (reference.hidden_size,):
            return "shape", f"the row has {len(row)} numbers instead of {reference.hidden_size}"
        if not np.isfinite(row).all():
            return "not_finite", "the row holds numbers that are not finite"
        if index >= len(record.commitments):
            return "missing", "the stream holds no commitment for it"
        if commitment(nonce, record.id, index, row) != base64.b64decode(record.commitments[index]):
            return "other_row", "the row revealed is not the one committed to while timed"
        ours = fingerprints(fingerprint_matrix(nonce, reference.hidden_size), row[None])[0]
        streamed = record.fingerprint_rows()[index]
        if not np.allclose(ours, streamed, rtol=0, atol=_FINGERPRINT_SLACK * float(np.abs(row).max())):
            return "other_fingerprint", "the row committed to has another fingerprint than the one streamed"
        theirs = reference.hidden(record.prompt, record.token_ids)[index]
        difference = np.abs(reference.logits(row[None]) - reference.logits(theirs[None]))
        worst = float(difference.max())
        if not worst <= case.profile.tolerance:
            allowed = f"{case.profile.tolerance:g} is allowed"
            return "over_tolerance", f"the row shown afterwards has a logit that is off by {worst:.3g}, {allowed}"
        return None


AUDIT = Commitment()
