"""The distribution of many non-negative numbers, seen piece by piece."""

from __future__ import annotations

import numpy as np

KEEP = 1 << 23
"""Numbers kept for exact quantiles (64 MiB of float64); beyond that the fine histogram answers."""

_FINE_SHIFT = 16  # float32 bits dropped by a fine bin: it spans 2^-7 (0.8 %) of its value
_COARSE_SHIFT = 22  # bits dropped by a shown bin: two bins from one power of two to the next
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LOWEST = 2.0**-40  # everything below is shown in the first bin


class Magnitudes:
    """Count, mean, maximum, quantiles and a histogram of non-negative finite numbers.

    The bits of a non-negative float32 grow with its value, so their upper half is a bin number of a logarithmic
    histogram. Quantiles are exact while at most `keep` numbers were seen. After that they are the upper edge of the
    fine bin that holds them: too high by less than 0.8 % of the value, and never too low by more than float32 rounds.
    """

    def __init__(self, *, keep: int = KEEP) -> None:
        self.count = 0
        self.total = 0.0
        self.maximum = 0.0
        self._keep = keep
        self._kept: list[np.ndarray] = []
        self._fine = np.zeros(1 << (31 - _FINE_SHIFT), np.int64)

    def add(self, values: np.ndarray) -> None:
        """values: float64, any shape."""
        if not values.size:
            return
        flat = values.reshape(-1)
        self.count += flat.size
        with np.errstate(over="ignore"):
            self.total += float(flat.sum())
        self.maximum = max(self.maximum, float(flat.max()))
        bits = np.minimum(flat, _FLOAT32_MAX).astype(np.float32).view(np.uint32)
        self._fine += np.bincount(bits >> _FINE_SHIFT, minlength=len(self._fine))
        if self.exact:
            self._kept.append(flat.copy())
        else:
            self._kept.clear()

    @property
    def exact(self) -> bool:
        """Whether every number seen is still at hand."""
        return self.count <= self._keep

    @property
    def mean(self) -> float:
        """0 when nothing was seen."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, q: float) -> float:
        """The smallest number with at least a share `q` of all numbers at or below it; 0 when nothing was seen."""
        if not self.count:
            return 0.0
        if self.exact:
            return float(np.quantile(np.concatenate(self._kept), q, method="inverted_cdf"))
        needed = max(1, int(np.ceil(q * self.count)))
        fine = int(np.searchsorted(np.cumsum(self._fine), needed))
        return min(_edge(fine + 1, _FINE_SHIFT), self.maximum)

    def histogram(self) -> tuple[list[float], list[int]]:
        """Edges [bins + 1] and counts [bins]; the first bin holds 0 and all below 2^-40 (9e-13)."""
        coarse = self._fine.reshape(-1, 1 << (_COARSE_SHIFT - _FINE_SHIFT)).sum(axis=1)
        lowest = int(np.float32(_LOWEST).view(np.uint32)) >> _COARSE_SHIFT
        used = np.flatnonzero(coarse)
        start = max(lowest, int(used[used >= lowest][0]) if (used >= lowest).any() else lowest)
        stop = max(start, int(used[-1]) + 1 if used.size else start)
        edges = [0.0, *(_edge(i, _COARSE_SHIFT) for i in range(start, stop + 1))]
        return edges, [int(coarse[:start].sum()), *(int(c) for c in coarse[start:stop])]


def _edge(index: int, shift: int) -> float:
    return min(float(np.uint32(index << shift).view(np.float32)), _FLOAT32_MAX)
