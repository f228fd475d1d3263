"""The tolerance rule is numpy's, every figure is what it says, and nothing hides a NaN."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isologit.fidelity import ComparisonAccumulator, compare_rows
from isologit.fidelity.magnitudes import Magnitudes


def _floats(dtype: str) -> st.SearchStrategy[np.ndarray]:
    width = 32 if dtype == "float32" else 64
    near = st.sampled_from([0.0, 0.005, -0.005, 1.0, 1.005, 0.995, float("nan"), float("inf"), float("-inf")])
    return hnp.arrays(dtype, (2, 5), elements=st.one_of(near, st.floats(width=width)).map(np.dtype(dtype).type))


@given(st.data(), st.sampled_from(["float32", "float64"]), st.sampled_from([0.0, 1e-5, 0.1]))
@settings(max_examples=150, deadline=None)
def test_verdict_is_that_of_numpy_allclose(data: st.DataObject, dtype: str, rtol: float) -> None:
    ours, theirs = data.draw(_floats(dtype)), data.draw(_floats(dtype))
    finite = np.isfinite(ours) & np.isfinite(theirs)
    found = compare_rows(ours, theirs, atol=5e-3, rtol=rtol)
    with np.errstate(all="ignore"):
        close = np.isclose(ours, theirs, atol=5e-3, rtol=rtol)
        assert found.ok == (bool(finite.all()) and np.allclose(ours, theirs, atol=5e-3, rtol=rtol))
    assert found.nonfinite == int((~finite).sum())
    assert found.over_tolerance == int((finite & ~close).sum())
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_difference_equal_to_the_tolerance_passes_and_the_next_number_fails(dtype: type) -> None:
    zero, edge = np.zeros(3, dtype), np.full(3, 5e-3, dtype)
    assert compare_rows(edge, zero, atol=5e-3).ok
    assert not compare_rows(np.nextafter(edge, dtype(1)), zero, atol=5e-3).ok


def test_relative_tolerance_is_taken_of_theirs() -> None:
    low, high = np.array([100.0]), np.array([110.5])
    assert compare_rows(low, high, atol=0.0, rtol=0.1).ok
    assert not compare_rows(high, low, atol=0.0, rtol=0.1).ok


def test_figures() -> None:
    theirs = np.array([[0.0, 1.0, 2.0, 4.0], [8.0, 0.0, -1.0, 1.0]], np.float32)
    ours = theirs.copy()
    ours[0, 3] += 0.5
    ours[1, 2] -= 0.25
    found = compare_rows(ours, theirs)
    assert (found.rows, found.values, found.over_tolerance) == (2, 8, 2)
    assert found.max_abs == 0.5
    assert found.mean_abs == pytest.approx(0.75 / 8)
    assert found.median_abs == 0.0
    assert found.max_rel == 0.25
    assert found.mean_rel == pytest.approx((0.125 + 0.25) / 6)  # two of theirs are 0
    assert found.max_fp16_ulp == 256  # 1 to 1.25 in steps of 2^-10; 4 to 4.5 is 128 steps of 2^-8
    assert found.top1_agreement == 1.0
    assert found.worst is not None
    assert (found.worst.row, found.worst.token, found.worst.ours, found.worst.theirs) == (0, 3, 4.5, 4.0)
    assert sum(found.histogram_counts) == 8
    assert len(found.histogram_edges) == len(found.histogram_counts) + 1
    assert (4.0, 0.5) in found.scatter


def test_kl_is_that_of_reference_against_ours() -> None:
    theirs = np.log(np.array([[0.5, 0.25, 0.25]]))
    ours = np.log(np.array([[0.25, 0.25, 0.5]])) + 3.0  # a constant changes no probability
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    found = compare_rows(ours, theirs)
    assert found.kl_max == pytest.approx(expected)
    assert found.kl_mean == found.kl_p99 == found.kl_max
    assert found.top1_agreement == 0.0


def test_zeros_of_both_signs_are_no_float16_step_apart() -> None:
    assert compare_rows(np.array([-0.0, 1.0]), np.array([0.0, 1.0])).max_fp16_ulp == 0


def test_shape_and_dtype_come_before_values() -> None:
    found = ComparisonAccumulator()
    assert not found.add("a", np.zeros(3, np.float32), np.zeros(4, np.float32))
    assert not found.add("b", np.zeros(3, np.float32), np.zeros(3, np.float64))
    assert not found.add("c", np.zeros(3, np.int32), np.zeros(3, np.int32))
    assert found.add("d", np.zeros(3, np.float32), np.zeros(3, np.float32))
    result = found.result()
    assert (result.shape_mismatches, result.dtype_mismatches, result.rows, result.ok) == (1, 2, 1, False)
    assert result.first_problem == "a: shape [3] against [4]"


def test_not_finite_values_fail_even_when_equal() -> None:
    row = np.array([1.0, np.inf], np.float32)
    found = compare_rows(row, row)
    assert (found.nonfinite, found.over_tolerance, found.ok) == (1, 0, False)
    assert found.first_problem is not None
    assert "token 1" in found.first_problem


def test_nothing_compared_is_not_ok() -> None:
    assert not compare_rows([], []).ok


def test_rows_one_by_one_and_all_at_once_agree() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 3, (20, 50)).astype(np.float32)
    ours = theirs + rng.normal(0, 1e-3, theirs.shape).astype(np.float32)
    whole, single = compare_rows(ours, theirs).to_dict(), compare_rows(list(ours), list(theirs)).to_dict()
    for name in ("rows", "max_abs", "p99_abs", "median_abs", "max_fp16_ulp", "kl_max", "histogram", "over_tolerance"):
        assert whole[name] == single[name]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
@settings(deadline=None)
def test_quantiles_from_the_histogram_are_close_from_above(values: list[float], q: float) -> None:
    exact, binned = Magnitudes(), Magnitudes(keep=0)
    for part in np.array_split(np.array(values), 3):
        exact.add(part)
        binned.add(part)
    assert exact.exact
    assert not binned.exact
    true = exact.quantile(q)
    assert true == np.sort(values)[max(0, int(np.ceil(q * len(values))) - 1)]
    assert true * (1 - 1e-6) <= binned.quantile(q) <= true * (1 + 2**-7) + 1e-37
    edges, counts = binned.histogram()
    assert all(a < b for a, b in pairwise(edges))
    assert counts == np.histogram(np.array(values, np.float32), edges)[0].tolist()
