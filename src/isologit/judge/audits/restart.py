"""A restarted entry is as slow as at first: nothing is kept between runs."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding, seconds_per_token
from isologit.judge.evidence import RunKind


class Restart:
    """Each run begins with an empty scratch; the same prompts again, in a new process, must not be faster."""

    name = "restart"
    title = "nothing survives a restart"
    runs: tuple[RunKind, ...] = ("known",)

    def verify(self, case: Case) -> list[Finding]:
        """Scratch that was not empty, or all later runs faster than the first by more than the profile's twin ratio."""
        for run in case.runs:
            if not run.process.scratch_was_empty:
                return [Finding("restart.scratch", "the scratch folder was not empty when the run began", run.run_id)]
        for kind in ("timed", "known"):
            times = [s for run in case.of(kind) if (s := seconds_per_token(run)) is not None]
            if len(times) > 1 and max(times[1:]) < case.profile.twin_ratio * times[0]:
                message = (
                    f"every later run of the same prompts took at most {max(times[1:]) / times[0]:.2f} of the first "
                    "one's time, though each began in a new process"
                )
                return [Finding("restart.faster", message, case.of(kind)[1].run_id)]
        return []


AUDIT = Restart()
