"""With one layer's weights changed, answers change as the reference's do, and the time does not."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding, time_ratio
from isologit.judge.audits.rescoring import not_greedy
from isologit.judge.evidence import RunKind

_SLOWER = 1.25


class PerturbedWeights:
    """The entry is started with a checkpoint that nobody has seen: stored answers are those of other weights."""

    name = "perturbed_weights"
    title = "answers are computed from the weights that are given"
    runs: tuple[RunKind, ...] = ("timed", "perturbed")

    def verify(self, case: Case) -> list[Finding]:
        """Tokens that are not the perturbed model's own, or another time."""
        found = []
        for run in case.of("perturbed"):
            wrong = not_greedy(case, run)
            if wrong is not None:
                found.append(
                    Finding(
                        "perturbed_weights.not_followed",
                        f"with changed weights, {wrong.message}",
                        run.run_id,
                        wrong.request,
                        wrong.index,
                    )
                )
        slower = time_ratio(case, case.of("perturbed"), case.of("timed"), min)
        if slower is not None and slower > _SLOWER and not found:
            message = f"with changed weights a token took {slower:.2f} times as long as in the timed runs"
            found.append(Finding("perturbed_weights.time", message, case.of("perturbed")[0].run_id))
        return found


AUDIT = PerturbedWeights()
