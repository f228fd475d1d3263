"""Copies of a prompt take as long as different prompts: no answer is reused. (MLPerf's TEST04.)"""

from __future__ import annotations

from statistics import median

from isologit.judge.audits.base import Case, Finding, seconds_per_token
from isologit.judge.evidence import RunKind


class Twins:
    """Seconds per output token when prompts repeat, against as many different ones."""

    name = "twins"
    title = "a repeated prompt is computed again"
    runs: tuple[RunKind, ...] = ("known", "twins")

    def verify(self, case: Case) -> list[Finding]:
        """Copies that are faster by more than the profile allows; prefix reuse alone is not."""
        known = [s for run in case.of("known") if (s := seconds_per_token(run)) is not None]
        copies = [s for run in case.of("twins") if (s := seconds_per_token(run)) is not None]
        if not known or not copies:
            return []
        ratio = median(copies) / median(known)
        if ratio >= case.profile.twin_ratio:
            return []
        message = (
            f"copies of prompts took {ratio:.2f} of the time per token of different ones; "
            f"at least {case.profile.twin_ratio:g} is expected of an engine that computes each"
        )
        return [Finding("twins.faster", message, case.of("twins")[0].run_id)]


AUDIT = Twins()
