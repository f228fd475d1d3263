"""The certificate of a run: VALID, or INVALID with reasons, and every figure behind it.

Owns what a verdict rests on and how it is put into words. The checking itself is in `certifier`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from isologit.common.verdict import Reason, Verdict
from isologit.fidelity.compare import Comparison
from isologit.fidelity.files import json_number
from isologit.fidelity.reference import NoiseFloor
from isologit.fidelity.rescore import Divergence

Mode = Literal["greedy", "replay", "sampled"]

_LISTED_DIVERGENCES = 50

_NO_GREEDY = {
    "replay": "The output tokens were given beforehand (replay), so the greedy check is left out.",
    "sampled": "The output tokens were drawn at random (sampled), so the greedy check is left out.",
}


@dataclass(frozen=True)
class RequestCounts:
    """issued = completed + failed, unless a reason says otherwise. refused: never issued, because they cannot run."""

    issued: int
    completed: int
    failed: int
    refused: int
    rescored: int

    @property
    def all_rescored(self) -> bool:
        """Whether the reference saw every completed request."""
        return self.rescored == self.completed


@dataclass(frozen=True)
class GreedyCheck:
    """Output tokens against the reference's argmax. divergences: all others, ties first marked by `tie_bound`."""

    tokens: int
    divergences: tuple[Divergence, ...]
    tie_bound: float

    @property
    def agreed(self) -> int:
        """Tokens that are the reference's argmax."""
        return self.tokens - len(self.divergences)

    @property
    def ties(self) -> int:
        """Tokens that are not, with a margin that rounding explains."""
        return sum(d.tie for d in self.divergences)

    @property
    def unexplained(self) -> int:
        """Tokens that are neither."""
        return len(self.divergences) - self.ties


@dataclass(frozen=True)
class Certificate:
    """What is known about a run's fidelity. Empty `reasons` means VALID.

    captured: the captured rows against the reference's at the same place, given the same tokens before.
    captured_rows_given: rows the run handed over; fewer are compared when the budget ended first. tokens_rescored:
    output tokens the reference saw. greedy: None when the mode leaves the check out. seed: of the order in which
    requests were re-scored, so also of the sample when not all were. noise_floor: the reference against itself, None
    when nothing could be scored.
    """

    reasons: tuple[Reason, ...]
    mode: Mode
    requests: RequestCounts
    captured: Comparison
    captured_rows_given: int
    tokens_rescored: int
    greedy: GreedyCheck | None
    noise_floor: NoiseFloor | None
    seed: int
    rescoring_s: float
    reference: Mapping[str, str]
    hashes: Mapping[str, str]

    @property
    def verdict(self) -> Verdict:
        """INVALID as soon as there is one reason; their codes are listed in docs/fidelity.md."""
        return Verdict.of(self.reasons)

    def statement(self) -> str:
        """The certificate as one paragraph."""
        rows, counts = self.captured, self.requests
        if self.reasons:
            more = len(self.reasons) - 1
            opening = f"INVALID: {self.reasons[0].message}" + (f" ({more} more reasons)." if more else ".")
        else:
            opening = "VALID."
        share = "all" if counts.all_rescored else f"a random sample (seed {self.seed}) of"
        scored = f"{share} {counts.rescored} of {counts.completed} completed requests"
        parts = [
            opening,
            f"{counts.completed} of {counts.issued} requests completed, {counts.failed} failed, {counts.refused} were "
            f"refused before the run. The reference ({self.reference['class']}, {self.reference['attention']} "
            f"attention, {self.reference['dtype']}) re-scored {scored}.",
            f"{rows.rows} of {self.captured_rows_given} captured logits rows of the run ({rows.values} values) were "
            f"compared with its rows: the largest difference is {rows.max_abs:.3g}, {rows.atol:g} is allowed"
            + (f" plus {rows.rtol:g} of the value" if rows.rtol else "")
            + f"; {rows.over_tolerance} values are over it and {rows.nonfinite} are not finite.",
        ]
        if self.noise_floor is not None:
            floor = self.noise_floor.max_abs
            parts.append(f"The reference differs from itself by {floor:.3g} when only batch and step sizes change.")
        if self.greedy is None:
            parts.append(_NO_GREEDY[self.mode])
        else:
            g = self.greedy
            parts.append(
                f"Of {g.tokens} greedy output tokens {g.agreed} are the reference's own choice, {g.ties} are ties "
                f"within a margin of {g.tie_bound:.3g}, and {g.unexplained} are neither."
            )
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON: no NaN, no infinity."""
        counts = self.requests
        return {
            **self.verdict.to_dict(),
            "statement": self.statement(),
            "mode": self.mode,
            "tolerance": {"atol": self.captured.atol, "rtol": self.captured.rtol},
            "requests": {
                "issued": counts.issued,
                "completed": counts.completed,
                "failed": counts.failed,
                "refused": counts.refused,
                "rescored": counts.rescored,
                "all_rescored": counts.all_rescored,
                "tokens_rescored": self.tokens_rescored,
                "seed": self.seed,
                "rescoring_s": round(self.rescoring_s, 3),
            },
            "captured": {"rows_given": self.captured_rows_given, **self.captured.to_dict()},
            "greedy": self._greedy_dict(),
            "noise_floor": None
            if self.noise_floor is None
            else {
                "max_abs": json_number(self.noise_floor.max_abs),
                "rows": self.noise_floor.rows,
                "batch_size": self.noise_floor.batch_size,
            },
            "reference": dict(self.reference),
            "hashes": dict(self.hashes),
        }

    def _greedy_dict(self) -> dict[str, Any]:
        g = self.greedy
        if g is None:
            return {"checked": False, "why": _NO_GREEDY[self.mode]}
        return {
            "checked": True,
            "tokens": g.tokens,
            "agreed": g.agreed,
            "top1_agreement": g.agreed / g.tokens if g.tokens else None,
            "ties": g.ties,
            "unexplained": g.unexplained,
            "tie_bound": json_number(g.tie_bound),
            "divergences": [d.to_dict() for d in g.divergences[:_LISTED_DIVERGENCES]],
        }
