"""Arrival processes have the distribution they claim, and repeat from their seed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from isologit.bench.arrivals import contest_arrivals, random_arrivals, trace_arrivals
from isologit.errors import ConfigError, DatasetError


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_variation_of_a_gamma_distribution(burstiness: float) -> None:
    gaps = np.diff(random_arrivals(40_001, 20.0, burstiness=burstiness, seed=3))
    assert gaps.mean() == pytest.approx(0.05, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_default_gaps_are_exponential_and_the_contests_are_not() -> None:
    def share_above_mean(gaps: np.ndarray) -> float:
        return float((gaps > gaps.mean()).mean())

    assert share_above_mean(np.diff(random_arrivals(20_001, 5.0))) == pytest.approx(math.exp(-1), abs=0.02)
    assert share_above_mean(np.diff(contest_arrivals(20_001, 5.0))) > 0.45


def test_contest_gaps_are_whole_milliseconds_with_a_few_percent_of_variation() -> None:
    """The archive's log at X = 5: 1500 gaps, mean 0.2000 s, standard deviation 0.0138 s."""
    gaps = np.diff(contest_arrivals(1501, 5.0))
    assert np.allclose(gaps * 1000, np.round(gaps * 1000), atol=1e-6)
    assert gaps.mean() == pytest.approx(0.2, rel=0.01)
    assert gaps.std() == pytest.approx(0.0141, rel=0.1)


@pytest.mark.parametrize(("rate", "mean_s"), [(150.0, 0.01), (60.0, 0.02), (201.0, 0.0), (math.inf, 0.0)])
def test_contest_rounds_the_mean_gap_to_hundredths(rate: float, mean_s: float) -> None:
    assert np.diff(contest_arrivals(3001, rate)).mean() == pytest.approx(mean_s, rel=0.03)


def test_constant_and_all_at_once() -> None:
    assert random_arrivals(4, 2.0, burstiness=math.inf).tolist() == [0.0, 0.5, 1.0, 1.5]
    assert random_arrivals(3, math.inf).tolist() == [0.0, 0.0, 0.0]
    assert random_arrivals(1, 2.0).tolist() == [0.0]


def test_a_seed_repeats_and_another_differs() -> None:
    assert random_arrivals(50, 3.0, seed=1).tolist() == random_arrivals(50, 3.0, seed=1).tolist()
    assert random_arrivals(50, 3.0, seed=1).tolist() != random_arrivals(50, 3.0, seed=2).tolist()
    assert contest_arrivals(50, 3.0, seed=1).tolist() != contest_arrivals(50, 3.0, seed=2).tolist()


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0)])
def test_meaningless_rates_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        random_arrivals(3, rate, burstiness=burstiness)


def test_trace_is_replayed_from_its_first_time(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text('100.5\n\n{"timestamp": 101, "input_length": 7}\n101\n104.25\n')
    assert trace_arrivals(trace, 4).tolist() == [0.0, 0.5, 0.5, 3.75]
    assert trace_arrivals(trace, 2).tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n0.5\n", ":2: 0.5 comes after 1"),
        ("1\nsoon\n", ":2: neither"),
        ('{"t": 1}\n2\n', ":1: neither"),
        ("1\ntrue\n", ":2: neither"),
        ("1\nNaN\n", ":2: neither"),
        ("1\n", "1 times for 2 requests"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    trace = tmp_path / "trace"
    trace.write_text(text)
    with pytest.raises(DatasetError, match=message):
        trace_arrivals(trace, 2)
