"""Copies of a prompt take as long as different prompts: no answer is reused. (MLPerf's TEST04.)"""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding, time_ratio
from isologit.judge.evidence import RunKind


class Twins:
    """Seconds per output token when prompts repeat, against as many different ones."""

    name = "twins"
    title = "a repeated prompt is computed again"
    runs: tuple[RunKind, ...] = ("timed", "twins")

    def verify(self, case: Case) -> list[Finding]:
        """Copies that are faster by more than the profile allows; prefix reuse alone is not."""
        ratio = time_ratio(case.of("twins"), case.of("timed"), max)
        if ratio is None or ratio >= case.profile.twin_ratio:
            return []
        message = (
            f"copies of prompts took {ratio:.2f} of the time per token of different ones; "
            f"at least {case.profile.twin_ratio:g} is expected of an engine that computes each"
        )
        return [Finding("twins.faster", message, case.of("twins")[0].run_id)]


AUDIT = Twins()
