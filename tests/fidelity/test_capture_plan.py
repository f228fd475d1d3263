"""The draw of captured rows: secret, repeatable, spread over first, middle and last tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isologit.fidelity import LAST, draw_capture_plan, resolve_capture

LENGTHS = {f"r{i}": 1 + (i * 37) % 90 for i in range(200)}


def test_every_stratum_is_drawn() -> None:
    plan = draw_capture_plan(LENGTHS, seed=7, rows=96)
    drawn = [index for indices in plan.values() for index in indices]
    assert len(drawn) == 96
    assert drawn.count(0) == 24
    assert drawn.count(LAST) == 24
    assert all(index < LENGTHS[request_id] for request_id, indices in plan.items() for index in indices)


def test_the_seed_decides_and_the_order_of_requests_does_not() -> None:
    plan = draw_capture_plan(LENGTHS, seed=7, rows=50)
    assert plan == draw_capture_plan(dict(reversed(LENGTHS.items())), seed=7, rows=50)
    assert plan != draw_capture_plan(LENGTHS, seed=8, rows=50)


def test_long_requests_are_drawn_in_proportion_to_their_tokens() -> None:
    lengths = {**{f"s{i}": 4 for i in range(100)}, "long": 2002}
    plan = draw_capture_plan(lengths, seed=0, rows=400)
    between = sum(index > 0 for index in plan["long"])
    assert 150 < between < 200  # 2000 of 2200 tokens lie in it, so about 182 of 200


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 6), max_size=8), st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_any_lengths_give_a_plan_of_existing_tokens(lengths: dict[str, int], rows: int, seed: int) -> None:
    plan = draw_capture_plan(lengths, seed=seed, rows=rows)
    total = 0
    for request_id, indices in plan.items():
        resolved = resolve_capture(indices, lengths[request_id])
        assert resolved
        assert len(resolved) == len(indices)
        assert all(0 <= index < lengths[request_id] for index in resolved)
        total += len(resolved)
    assert total == min(rows, sum(lengths.values()))


def test_last_is_resolved_when_the_output_is_known() -> None:
    assert resolve_capture({0, 5, LAST}, 3) == {0, 2}
    assert resolve_capture({LAST, 2}, 3) == {2}
    assert resolve_capture({LAST, 0}, 0) == frozenset()


def test_a_plan_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="checks nothing"):
        draw_capture_plan({"a": 3}, seed=0, rows=0)
