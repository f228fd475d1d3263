"""Ranks that mean something: paired log-ratios to an anchor, intervals, exact tests, and shared ranks.

Every time is compared with the anchor's of the same repeat, so that what the machine does in that hour cancels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 9999
LEAST_APART = 5
"""Repeats from which on two entries can be told apart at all: four without overlap give `pair_p` 0.057, five 0.016."""


@dataclass(frozen=True)
class Score:
    """An entry against the anchor. ratio: median over repeats of its time over the anchor's; low, high: its interval.

    repeats: pairs. coverage: of the interval from the smallest to the largest time, by order statistics.
    """

    ratio: float
    low: float
    high: float
    median_s: float
    fastest_s: float
    slowest_s: float
    repeats: int
    coverage: float


@dataclass(frozen=True)
class Ranked:
    """A place on the board; entries that cannot be told apart share a rank."""

    name: str
    rank: int
    score: Score
    tied_with: tuple[str, ...]


def score(times_s: Sequence[float], anchor_s: Sequence[float], *, seed: int = 0) -> Score:
    """Times of an entry and of the anchor in the same repeats, both [n]; n is at least 1.

    The interval is a bootstrap of the median of the log-ratios (scipy, percentile, 9999 resamples); with fewer than
    three pairs it is the range. Raises ValueError for times that are not positive or lists of different lengths.
    """
    ours, theirs = np.asarray(times_s, np.float64), np.asarray(anchor_s, np.float64)
    if ours.shape != theirs.shape or ours.size == 0 or not (ours > 0).all() or not (theirs > 0).all():
        raise ValueError("a score needs as many positive times of the entry as of the anchor, and at least one")
    ratios = np.log(ours / theirs)
    if len(ratios) < 3 or np.ptp(ratios) == 0:
        low, high = ratios.min(), ratios.max()
    else:
        found = stats.bootstrap(
            (ratios,), np.median, confidence_level=CONFIDENCE, n_resamples=_RESAMPLES, method="percentile",
            rng=np.random.default_rng(seed),
        )  # fmt: skip
        low, high = found.confidence_interval
    return Score(
        ratio=float(np.exp(np.median(ratios))),
        low=float(np.exp(low)),
        high=float(np.exp(high)),
        median_s=float(np.median(ours)),
        fastest_s=float(ours.min()),
        slowest_s=float(ours.max()),
        repeats=len(ours),
        coverage=range_coverage(len(ours)),
    )


def range_coverage(n: int) -> float:
    """Chance that the median of a distribution lies between the smallest and the largest of n draws: 1 - 2^(1 - n)."""
    return 1.0 - 2.0 ** (1 - n)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact two-sided p of the sign-flip test on the mean of paired differences [n] (Fisher 1935); n up to 20."""
    values = np.asarray(differences, np.float64)
    observed = abs(values.mean())
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
    flipped = np.abs((signs * values).mean(axis=1))
    return float((flipped >= observed - 1e-12).mean())


def pair_p(ours_s: Sequence[float], theirs_s: Sequence[float]) -> float:
    """Two-sided p for two entries having the same times, both [n] in the repeats' order.

    The smaller of two exact tests, doubled for taking the smaller: sign flips of the paired log-ratios, which cancels
    what the machine does, and the rank-sum test (Mann and Whitney 1947), which has more power where times are apart:
    six repeats without overlap give 0.0043, while six sign flips cannot go below 0.03.
    """
    ours, theirs = np.asarray(ours_s, np.float64), np.asarray(theirs_s, np.float64)
    flips = sign_flip_p(np.log(ours / theirs).tolist())
    ranks = float(stats.mannwhitneyu(ours, theirs, method="exact").pvalue)
    return min(1.0, 2 * min(flips, ranks))


def holm(p_values: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Holm's step-down correction (1979) of several p-values."""
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    corrected: dict[tuple[str, str], float] = {}
    largest = 0.0
    for place, (pair, p) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - place) * p))
        corrected[pair] = largest
    return corrected


def rank(times_s: Mapping[str, Sequence[float]], anchor: str, ranked: Collection[str] | None = None) -> list[Ranked]:
    """Entries by time, the fastest first. times_s: seconds by entry, one for each repeat, in the repeats' order.

    ranked: the VALID ones; the others get no place and take none (None: all are VALID). Sorted by the median ratio to
    the anchor. An entry shares the rank of the one before it when the two cannot be told apart at 5 %, by `pair_p`
    after Holm's correction over all pairs of neighbours.
    """
    chosen = times_s if ranked is None else ranked
    scores = {name: score(times_s[name], times_s[anchor]) for name in chosen}
    order = sorted(scores, key=lambda name: scores[name].ratio)
    pairs = list(itertools.pairwise(order))
    raw = {(a, b): pair_p(times_s[a], times_s[b]) for a, b in pairs}
    corrected = holm(raw)
    ranks: dict[str, int] = {}
    for place, name in enumerate(order):
        before = order[place - 1] if place else None
        tied = before is not None and corrected[before, name] > 1 - CONFIDENCE
        ranks[name] = ranks[before] if tied and before is not None else place + 1
    return [
        Ranked(name, ranks[name], scores[name], tuple(n for n in order if n != name and ranks[n] == ranks[name]))
        for name in order
    ]


def clean_rows_bound(n: int) -> float:
    """Largest share of bad rows that n clean secret rows leave possible at 95 %: about 3 / n (the rule of three)."""
    return 1.0 if n == 0 else 1.0 - math.exp(math.log(1 - CONFIDENCE) / n)


def accusation_bound(clean_runs: int) -> float:
    """Largest rate of false accusations that so many clean honest runs leave possible at 95 %."""
    return clean_rows_bound(clean_runs)
