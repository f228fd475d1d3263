"""What the rules ask of an entry's own words: a technique where one is required, and a time under the bar."""

from __future__ import annotations

from statistics import median

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunKind


class EntryRules:
    """Settings alone are no entry where the profile asks for a technique."""

    name = "entry_rules"
    title = "the rules of this profile are met"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """A missing technique, or a median time over the bar."""
        found, bar = [], case.profile.time_bar_s
        if case.profile.requires_technique and not case.spec.techniques:
            message = "names no technique; this profile does not take settings alone (list `techniques` in entry.yaml)"
            found.append(Finding("entry_rules.no_technique", message))
        times = [run.duration_s for run in case.of("timed") if run.duration_s is not None]
        if bar is not None and times and median(times) > bar:
            found.append(
                Finding("entry_rules.over_the_bar", f"took {median(times):.1f} s in the median; the bar is {bar:g} s")
            )
        return found


AUDIT = EntryRules()
