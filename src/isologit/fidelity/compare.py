"""Two sets of logits rows against each other.

Owns the tolerance rule and every figure about a difference. It does not know where the rows come from, nor what a
verdict means for a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isologit.common.verdict import Reason
from isologit.fidelity.files import json_number
from isologit.fidelity.magnitudes import Magnitudes

ATOL = 5e-3
"""The contest's tolerance: five thousandths, absolute."""

_SCATTER_PER_ROW = 8
_MAX_SCATTER = 1500


@dataclass(frozen=True)
class Worst:
    """The value that differs most: which row, which token, and both logits."""

    key: str
    row: int
    token: int
    ours: float
    theirs: float
    abs_diff: float


@dataclass(frozen=True)
class Comparison:
    """What a comparison found. Differences are |ours - theirs| over finite values, taken in float64.

    rows, values: compared. shape_mismatches, dtype_mismatches: pairs left out because they cannot be compared;
    first_problem names the first of them or the first value that is not finite. nonfinite: NaN or infinite values.
    over_tolerance: finite values for which numpy's `isclose` says no. max_rel, mean_rel: difference over |theirs|,
    where theirs is not 0. max_fp16_ulp: largest distance in float16 steps after rounding both to float16. kl_*: nats,
    KL(theirs || ours) by row. top1_agreement: share of rows with the same argmax. quantiles: "exact" or "histogram",
    how median and p99 were found (see `Magnitudes`). scatter: sampled pairs (|theirs|, difference), drawn from each
    row's worst value and eight others.
    """

    atol: float
    rtol: float
    rows: int
    values: int
    shape_mismatches: int
    dtype_mismatches: int
    nonfinite: int
    over_tolerance: int
    first_problem: str | None
    max_abs: float
    mean_abs: float
    median_abs: float
    p99_abs: float
    quantiles: str
    max_rel: float
    mean_rel: float
    max_fp16_ulp: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    worst: Worst | None
    histogram_edges: tuple[float, ...]
    histogram_counts: tuple[int, ...]
    scatter: tuple[tuple[float, float], ...]

    @property
    def ok(self) -> bool:
        """Something was compared, all of it could be, every value is finite, and none is over the tolerance."""
        problems = self.shape_mismatches + self.dtype_mismatches + self.nonfinite + self.over_tolerance
        return self.rows > 0 and problems == 0

    def reasons(self, kind: str = "") -> list[Reason]:
        """Why it fails, in the order of the checks: shape, dtype, finite, tolerance. kind: says which rows they are."""
        where = f"first problem: {self.first_problem}"
        found = [
            ("shape", self.shape_mismatches, f"{kind}rows have the wrong shape; {where}"),
            ("dtype", self.dtype_mismatches, f"{kind}rows are not float32; {where}"),
            ("not_finite", self.nonfinite, f"{kind}values are not finite; {where}"),
        ]
        if self.worst is not None:
            worst = f"{self.worst.abs_diff:.3g} ({self.worst.key}, token {self.worst.token})"
            over = f"of {self.values} {kind}values are over the tolerance of {self.atol:g}; the largest difference is"
            found.append(("over_tolerance", self.over_tolerance, f"{over} {worst}"))
        return [Reason(code, f"{count} {message}") for code, count, message in found if count]

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON; a figure that is not finite is None."""
        found: dict[str, Any] = {
            name: json_number(value) if isinstance(value, float) else value
            for name, value in asdict(self).items()
            if name not in {"atol", "rtol", "worst", "histogram_edges", "histogram_counts", "scatter"}
        }
        found["worst"] = None if self.worst is None else asdict(self.worst)
        found["histogram"] = {"edges": list(self.histogram_edges), "counts": list(self.histogram_counts)}
        found["scatter"] = [list(pair) for pair in self.scatter]
        return found


class ComparisonAccumulator:
    """A `Comparison` made row by row, so that no two sets of rows need to be in memory.

    The order of checks is shape, dtype, finite, tolerance. The tolerance rule is numpy's own: |ours - theirs| <= atol +
    rtol * |theirs|, computed by `numpy.isclose` in the arrays' dtype, and not symmetric when rtol > 0. One thing is
    stricter than `numpy.allclose`: two equal infinities are not finite, so they fail.
    """

    def __init__(self, *, atol: float = ATOL, rtol: float = 0.0, seed: int = 0) -> None:
        self.atol, self.rtol = atol, rtol
        self._rng = np.random.default_rng(seed)
        self._abs, self._rel = Magnitudes(), Magnitudes()
        self._rows = self._values = 0
        self._shape = self._dtype = self._nonfinite = self._over = 0
        self._agree = self._ulp = 0
        self._first_problem: str | None = None
        self._kl: list[np.ndarray] = []
        self._worst: Worst | None = None
        self._scatter: list[np.ndarray] = []

    def add(self, key: str, ours: np.ndarray, theirs: np.ndarray) -> bool:
        """Compare one row [vocab] or several [n, vocab]; True when all is finite and within the tolerance.

        key: names the rows in messages. Both must have the same shape and the same float dtype; if not, the pair counts
        as a mismatch and its values are not looked at.
        """
        if ours.shape != theirs.shape or ours.ndim not in (1, 2):
            self._shape += 1
            return self._note(f"{key}: shape {list(ours.shape)} against {list(theirs.shape)}")
        if ours.dtype != theirs.dtype or ours.dtype.kind != "f":
            self._dtype += 1
            return self._note(f"{key}: dtype {ours.dtype} against {theirs.dtype}")
        ours, theirs = np.atleast_2d(ours), np.atleast_2d(theirs)
        if not ours.size:
            return True
        finite = np.isfinite(ours) & np.isfinite(theirs)
        close = np.isclose(ours, theirs, atol=self.atol, rtol=self.rtol)
        num_bad, num_over = int(np.count_nonzero(~finite)), int(np.count_nonzero(finite & ~close))
        self._rows += len(ours)
        self._values += ours.size
        self._nonfinite += num_bad
        self._over += num_over
        if num_bad:
            row, token = np.argwhere(~finite)[0].tolist()
            self._note(f"{key} row {row} token {token}: {ours[row, token]} against {theirs[row, token]}")
        self._measure(key, ours, theirs, finite)
        return num_bad == 0 and num_over == 0

    def _note(self, problem: str) -> bool:
        self._first_problem = self._first_problem or problem
        return False

    def _measure(self, key: str, ours: np.ndarray, theirs: np.ndarray, finite: np.ndarray) -> None:
        """Every figure of [n, vocab] rows; values that are not finite are left out of all but the argmax."""
        whole = finite.all(axis=1)
        self._agree += int((ours.argmax(axis=1) == theirs.argmax(axis=1))[whole].sum())
        wide_ours = np.where(finite, ours, 0).astype(np.float64)
        wide_theirs = np.where(finite, theirs, 0).astype(np.float64)
        with np.errstate(over="ignore"):
            delta = np.minimum(np.abs(wide_ours - wide_theirs), np.finfo(np.float64).max)
        self._abs.add(delta[finite])
        known = finite & (theirs != 0)
        with np.errstate(over="ignore"):
            self._rel.add(delta[known] / np.abs(wide_theirs[known]))
        ulp = np.abs(_fp16_order(wide_ours) - _fp16_order(wide_theirs))
        self._ulp = max(self._ulp, int(ulp.max()))
        if whole.any():
            self._kl.append(_kl(wide_theirs[whole], wide_ours[whole]))
        self._sample(np.abs(wide_theirs), delta, finite)
        row, token = np.unravel_index(int(np.where(finite, delta, -1.0).argmax()), delta.shape)
        worst = float(delta[row, token])
        if finite[row, token] and (self._worst is None or worst > self._worst.abs_diff):
            ours_value, theirs_value = float(wide_ours[row, token]), float(wide_theirs[row, token])
            self._worst = Worst(key, int(row), int(token), ours_value, theirs_value, worst)

    def _sample(self, magnitude: np.ndarray, delta: np.ndarray, finite: np.ndarray) -> None:
        rows, vocab = delta.shape
        drawn = self._rng.integers(vocab, size=(rows, _SCATTER_PER_ROW))
        tokens = np.concatenate([delta.argmax(axis=1)[:, None], drawn], axis=1)
        keep = np.take_along_axis(finite, tokens, axis=1)
        pairs = [np.take_along_axis(values, tokens, axis=1)[keep] for values in (magnitude, delta)]
        self._scatter.append(np.stack(pairs, axis=1))

    def result(self) -> Comparison:
        """Everything found so far."""
        edges, counts = self._abs.histogram()
        kl = np.concatenate(self._kl) if self._kl else np.zeros(0)
        scatter = np.concatenate(self._scatter) if self._scatter else np.zeros((0, 2))
        if len(scatter) > _MAX_SCATTER:
            scatter = scatter[np.random.default_rng(0).choice(len(scatter), _MAX_SCATTER, replace=False)]
        return Comparison(
            atol=self.atol,
            rtol=self.rtol,
            rows=self._rows,
            values=self._values,
            shape_mismatches=self._shape,
            dtype_mismatches=self._dtype,
            nonfinite=self._nonfinite,
            over_tolerance=self._over,
            first_problem=self._first_problem,
            max_abs=self._abs.maximum,
            mean_abs=self._abs.mean,
            median_abs=self._abs.quantile(0.5),
            p99_abs=self._abs.quantile(0.99),
            quantiles="exact" if self._abs.exact else "histogram",
            max_rel=self._rel.maximum,
            mean_rel=self._rel.mean,
            max_fp16_ulp=self._ulp,
            kl_mean=float(kl.mean()) if kl.size else 0.0,
            kl_p99=float(np.quantile(kl, 0.99, method="inverted_cdf")) if kl.size else 0.0,
            kl_max=float(kl.max()) if kl.size else 0.0,
            top1_agreement=self._agree / self._rows if self._rows else 0.0,
            worst=self._worst,
            histogram_edges=tuple(edges),
            histogram_counts=tuple(counts),
            scatter=tuple((float(x), float(y)) for x, y in scatter),
        )


def compare_rows(
    ours: np.ndarray | Sequence[np.ndarray],
    theirs: np.ndarray | Sequence[np.ndarray],
    *,
    atol: float = ATOL,
    rtol: float = 0.0,
) -> Comparison:
    """Compare rows [vocab] or [n, vocab], or lists of such; see `ComparisonAccumulator` for the rule."""
    found = ComparisonAccumulator(atol=atol, rtol=rtol)
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
        found.add("rows", ours, theirs)
    else:
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            found.add(f"row {i}", mine, other)
    return found.result()


def _fp16_order(values: np.ndarray) -> np.ndarray:
    """int32: rank of a value among all float16 values, so that neighbours differ by 1 and both zeros are equal."""
    with np.errstate(over="ignore"):
        bits = values.astype(np.float16).view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def _kl(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64 [n]: KL(reference || other) in nats of the softmax of float64 [n, vocab] rows."""
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    return np.asarray(np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0))


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows - rows.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
