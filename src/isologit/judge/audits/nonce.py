"""Fingerprints belong to this run: those of an older nonce are found."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunKind


class Nonce:
    """Every run has a nonce of its own, so the same row has another fingerprint in each."""

    name = "nonce"
    title = "fingerprints are those of the run's own nonce"
    runs: tuple[RunKind, ...] = ("timed",)

    def verify(self, case: Case) -> list[Finding]:
        """Fingerprints that two runs with different nonces share, byte for byte."""
        seen: dict[str, str] = {}
        for run in case.runs:
            for record in case.answers(run):
                for index, fingerprint in enumerate(record.fingerprints):
                    other = seen.setdefault(fingerprint, run.nonce)
                    if other != run.nonce:
                        message = f"request {record.id} token {index}: the fingerprint is one of an earlier run"
                        return [Finding("nonce.replayed", message, run.run_id, record.id, index)]
        return []


AUDIT = Nonce()
