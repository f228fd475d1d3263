"""Ranks, intervals and tests, against values known from elsewhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from isologit.judge import statistics


def test_the_range_of_six_covers_the_median() -> None:
    assert statistics.range_coverage(6) == pytest.approx(0.969, abs=5e-4)
    assert statistics.range_coverage(3) == pytest.approx(0.75)


def test_the_rule_of_three() -> None:
    assert statistics.clean_rows_bound(300) == pytest.approx(3 / 300, rel=0.01)
    assert statistics.accusation_bound(299) < 0.01
    assert statistics.accusation_bound(298) > 0.00999
    assert statistics.accusation_bound(20) == pytest.approx(0.139, abs=1e-3)
    assert statistics.clean_rows_bound(0) == 1


def test_sign_flips_are_counted_exactly() -> None:
    values = [0.3, 0.1, 0.4, 0.2, 0.25, 0.5]
    assert statistics.sign_flip_p(values) == pytest.approx(2 / 64)
    mixed = [0.3, -0.1, 0.4, -0.2, 0.25, 0.05]
    brute = np.mean(
        [
            abs(sum(s * v for s, v in zip(signs, mixed, strict=True))) >= abs(sum(mixed)) - 1e-12
            for signs in itertools.product((1, -1), repeat=6)
        ]
    )
    assert statistics.sign_flip_p(mixed) == pytest.approx(brute)


def test_so_many_repeats_tell_entries_apart_and_no_fewer() -> None:
    least = statistics.LEAST_APART
    assert statistics.pair_p(range(1, least + 1), range(11, least + 11)) < 0.05
    assert statistics.pair_p(range(1, least), range(11, least + 10)) > 0.05


def test_holm_steps_down_and_never_falls() -> None:
    found = statistics.holm({("a", "b"): 0.01, ("b", "c"): 0.04, ("c", "d"): 0.03})
    assert found["a", "b"] == pytest.approx(0.03)
    assert found["c", "d"] == pytest.approx(0.06)
    assert found["b", "c"] == pytest.approx(0.06)


def test_a_score_cancels_what_the_machine_does() -> None:
    """Both twice as slow in one repeat: the ratio does not see it."""
    anchor = [10.0, 20.0, 10.1, 9.9, 10.0, 10.2]
    found = statistics.score([0.8 * second for second in anchor], anchor)
    assert found.ratio == pytest.approx(0.8)
    assert found.low == pytest.approx(0.8)
    assert found.high == pytest.approx(0.8)


@pytest.mark.parametrize(("ours", "anchor"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_times_that_cannot_be_scored(ours: list[float], anchor: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        statistics.score(ours, anchor)


def test_entries_that_cannot_be_told_apart_share_a_rank() -> None:
    base = np.array([10.0, 10.4, 9.8, 10.1, 10.2, 9.9])
    rng = np.random.default_rng(1)
    times = {
        "anchor": base.tolist(),
        "same": (base * np.array([1.01, 0.99, 1.005, 0.995, 0.99, 1.01])).tolist(),
        "fast": (base * 0.7 * rng.uniform(0.99, 1.01, 6)).tolist(),
    }
    found = {place.name: place for place in statistics.rank(times, "anchor")}
    assert found["anchor"].rank == found["same"].rank
    assert found["anchor"].tied_with == ("same",)


def test_clear_differences_have_ranks_of_their_own() -> None:
    """The inverse, with as many repeats as a final has."""
    base = np.array([10.0, 10.4, 9.8, 10.1, 10.2, 9.9, 10.0, 10.3, 9.7, 10.1])
    found = statistics.rank({"a": base.tolist(), "b": (base * 0.9).tolist(), "c": (base * 0.8).tolist()}, "a")
    assert [(place.name, place.rank) for place in found] == [("c", 1), ("b", 2), ("a", 3)]


def test_an_anchor_that_is_not_valid_takes_no_rank() -> None:
    base = np.array([10.0, 10.4, 9.8, 10.1, 10.2, 9.9])
    times = {"a": base.tolist(), "b": (2 * base).tolist(), "c": (3 * base).tolist()}
    found = statistics.rank(times, "a", ["b", "c"])
    assert [(place.name, place.rank) for place in found] == [("b", 1), ("c", 2)]
    assert found[0].score.ratio == pytest.approx(2)
