"""A restarted entry is as slow as at first: nothing is kept between runs."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding, time_ratio
from isologit.judge.evidence import RunKind


class Restart:
    """Each run begins with an empty scratch; the same prompts again, in a new process, must not be faster."""

    name = "restart"
    title = "nothing survives a restart"
    runs: tuple[RunKind, ...] = ("timed",)

    def verify(self, case: Case) -> list[Finding]:
        """Scratch that was not empty, or all later runs faster than the first by more than the profile's twin ratio.

        The first of the secret prompts' runs, which nothing can have been kept for either, is a second first one: a
        machine that was slow for one of them accuses nobody.
        """
        for run in case.runs:
            if not run.process.scratch_was_empty:
                return [Finding("restart.scratch", "the scratch folder was not empty when the run began", run.run_id)]
        runs = case.of("timed")
        ratios = [time_ratio(case, runs[1:], firsts, max) for firsts in (runs[:1], case.of("held-out")[:1])]
        ratio = max((ratio for ratio in ratios if ratio is not None), default=None)
        if ratio is None or ratio >= case.profile.twin_ratio:
            return []
        message = (
            f"later runs of the same prompts took {ratio:.2f} of the first one's time per token, though each began in "
            "a new process"
        )
        return [Finding("restart.faster", message, runs[1].run_id)]


AUDIT = Restart()
