"""Prompts nobody knew take as long as those of the round: nothing was memorised or tuned to the data."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding, time_ratio
from isologit.judge.evidence import RunKind


class HeldOut:
    """Seconds per output token on a secret set against as many prompts of the timed set, of the same lengths."""

    name = "held_out"
    title = "secret prompts are not slower than known ones"
    runs: tuple[RunKind, ...] = ("known", "held-out")

    def verify(self, case: Case) -> list[Finding]:
        """Held-out prompts that take longer by more than the profile's ratio."""
        ratio = time_ratio(case.of("held-out"), case.of("known"), min)
        if ratio is None or ratio <= case.profile.held_out_ratio:
            return []
        message = (
            f"secret prompts took {ratio:.2f} times as long per token as known ones of the same lengths; "
            f"{case.profile.held_out_ratio:g} is allowed"
        )
        return [Finding("held_out.slower", message, case.of("held-out")[0].run_id)]


AUDIT = HeldOut()
