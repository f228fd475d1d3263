"""Copies of a prompt take as long as different prompts: no answer is reused. (MLPerf's TEST04.)"""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding, time_ratio
from isologit.judge.evidence import RunKind


class Twins:
    """Seconds per token when prompts repeat, against as many different ones."""

    name = "twins"
    title = "a repeated prompt is computed again"
    runs: tuple[RunKind, ...] = ("timed", "twins")

    def verify(self, case: Case) -> list[Finding]:
        """Copies that are faster by more than the profile allows, when all their prompts cost nothing.

        Reuse of a prompt's keys and values is honest, and can save as much as the prompts are of all tokens.
        """
        ratio = time_ratio(case, case.of("twins"), case.of("timed"), max)
        least = case.profile.twin_ratio * _output_share(case)
        if ratio is None or ratio >= least:
            return []
        message = (
            f"copies of prompts took {ratio:.2f} of the time per token of different ones; at least {least:.2f} is "
            "expected of an engine that computes each answer"
        )
        return [Finding("twins.faster", message, case.of("twins")[0].run_id)]


def _output_share(case: Case) -> float:
    """Output tokens of the copies over all their tokens."""
    counts = [case.num_tokens(run) for run in case.of("twins")]
    prompts, outputs = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return outputs / (prompts + outputs) if outputs else 1.0


AUDIT = Twins()
