"""Prompts nobody knew take as long as those of the round: nothing was memorised or tuned to the data."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding, time_ratio
from isologit.judge.evidence import RunKind


class HeldOut:
    """Seconds per token of a secret set against the timed runs: as many requests of the same lengths, so that an
    entry cannot be honest only where it is checked."""

    name = "held_out"
    title = "secret prompts are not slower than known ones"
    runs: tuple[RunKind, ...] = ("timed", "held-out")

    def verify(self, case: Case) -> list[Finding]:
        """Held-out prompts that take longer by more than the profile's ratio."""
        ratio = time_ratio(case, case.of("held-out"), case.of("timed"), min)
        if ratio is None or ratio <= case.profile.held_out_ratio:
            return []
        message = (
            f"secret prompts took {ratio:.2f} times as long per token as the timed ones, of the same lengths; "
            f"{case.profile.held_out_ratio:g} is allowed"
        )
        return [Finding("held_out.slower", message, case.of("held-out")[0].run_id)]


AUDIT = HeldOut()
