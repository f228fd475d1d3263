"""The attention's share of a flat batch: every token meets every head once, and the longest work comes first."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isologit.backends.batch import FlatBatch
from isologit.backends.cpu.work import Costs, attention_work, split

_SEQUENCES = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 500)), min_size=1, max_size=12)


def _batch(sequences: list[tuple[int, int]]) -> FlatBatch:
    counts = np.array([count for count, _ in sequences])
    table = np.stack([np.cumsum(counts) - counts, counts, [start for _, start in sequences]], axis=1)
    nothing = np.zeros(int(counts.sum()), np.int64)
    places = np.arange(len(counts))
    tables = np.zeros((len(counts), 1), np.int64)
    return FlatBatch(nothing, nothing, nothing, table, tables, places, nothing, np.zeros(len(nothing), bool))


@given(_SEQUENCES, st.integers(1, 12), st.integers(1, 8), st.integers(1, 5))
def test_every_token_meets_every_head_once(
    sequences: list[tuple[int, int]], tokens_per_tile: int, num_kv_heads: int, num_threads: int
) -> None:
    batch = _batch(sequences)
    work = attention_work(batch, tokens_per_tile, num_kv_heads, num_threads)
    tiles, items = work.tiles, work.items
    met = Counter(
        (row, head)
        for first_tile, last_tile, first_head, last_head in items
        for first_row, rows, *_ in tiles[first_tile:last_tile]
        for row in range(first_row, first_row + rows)
        for head in range(first_head, last_head)
    )
    rows = sum(count for count, _ in sequences)
    assert met == Counter((row, head) for row in range(rows) for head in range(num_kv_heads))


@given(_SEQUENCES, st.integers(1, 12))
def test_tiles_know_their_place(sequences: list[tuple[int, int]], tokens_per_tile: int) -> None:
    batch = _batch(sequences)
    work = attention_work(batch, tokens_per_tile, 4, 2)
    tiles, items = work.tiles, work.items
    for first_row, rows, first_position, sequence, alone in tiles:
        first, count, start = batch.sequences[sequence]
        assert 1 <= rows <= tokens_per_tile
        assert first <= first_row
        assert first_row + rows <= first + count
        assert first_position - start == first_row - first
        assert alone == (count <= tokens_per_tile)
    for first_tile, last_tile, *_ in items:
        assert len(set(tiles[first_tile:last_tile, 3])) == 1, "an item is of one sequence"


@given(_SEQUENCES, st.integers(1, 12), st.data())
def test_only_rows_with_logits_when_no_more_is_wanted(
    sequences: list[tuple[int, int]], tokens_per_tile: int, data: st.DataObject
) -> None:
    """And what a tile does not hold of its sequence is among what must be written first."""
    wanted = [data.draw(st.integers(0, count)) for count, _ in sequences]
    ends = np.cumsum([count for count, _ in sequences])
    rows = [row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)]
    batch = replace(_batch(sequences), logits_rows=np.array(rows, np.int64))
    work = attention_work(batch, tokens_per_tile, 2, 2, logits_only=True)
    met = [row for first_row, count, *_ in work.tiles for row in range(first_row, first_row + count)]
    assert sorted(met) == rows
    whole = {sequence: count for _, count, _, sequence, alone in work.tiles if alone}
    assert all(count == sequences[sequence][0] for sequence, count in whole.items())
    others = [i for i in range(len(sequences)) if i not in whole]
    assert work.written_first.tolist() == batch.sequences[others].tolist()


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 50)), min_size=1), st.integers(1, 8), st.integers(1, 5))
def test_sequences_of_one_tile_each_are_dealt_as_any_others(
    sequences: list[tuple[int, int]], num_kv_heads: int, num_threads: int
) -> None:
    """All rows are wanted, so both ways describe the same work; only one of them is made for it."""
    batch = _batch(sequences)
    batch = replace(batch, logits_rows=np.arange(len(batch.token_ids)))
    quick = attention_work(batch, 6, num_kv_heads, num_threads)
    general = attention_work(batch, 6, num_kv_heads, num_threads, logits_only=True)
    for name in ("tiles", "items", "written_first"):
        np.testing.assert_array_equal(getattr(quick, name), getattr(general, name))
        assert getattr(quick, name).dtype == np.int64
        assert getattr(quick, name).flags.c_contiguous


_COSTS = st.builds(Costs, st.floats(0, 0.1), st.floats(0, 0.01), st.floats(0, 0.5))


@given(_SEQUENCES, st.integers(1, 4), _COSTS, st.data())
def test_parts_are_whole_sequences_of_about_the_same_cost(
    sequences: list[tuple[int, int]], num_parts: int, costs: Costs, data: st.DataObject
) -> None:
    batch = _batch(sequences)
    rows = len(batch.token_ids)
    wanted = sorted(data.draw(st.sets(st.integers(0, rows - 1))))
    batch = replace(
        batch,
        token_ids=np.arange(rows),
        logits_rows=np.array(wanted, np.int64),
        logits_wanted=np.array(wanted, np.int64) % 3 == 0,
    )
    parts = split(batch, num_parts, costs)
    if parts[0] is batch:
        return
    assert len(parts) == num_parts
    assert np.concatenate([part.token_ids for part in parts]).tolist() == list(range(rows))
    assert np.concatenate([part.table_rows for part in parts]).tolist() == batch.table_rows.tolist()
    assert np.concatenate([part.logits_wanted for part in parts]).tolist() == batch.logits_wanted.tolist()
    assert np.concatenate([part.token_ids[part.logits_rows] for part in parts]).tolist() == wanted
    for part in parts:
        first_row, counts, _ = part.sequences.T
        assert first_row.tolist() == (np.cumsum(counts) - counts).tolist()
        assert counts.sum() == len(part.token_ids)
    assert np.concatenate([part.sequences[:, 1:] for part in parts]).tolist() == batch.sequences[:, 1:].tolist()
    each = [costs.of(part).sum() for part in parts]
    assert np.isclose(sum(each), costs.of(batch).sum())
    assert max(each) <= 1.1001 * sum(each) / num_parts


def test_what_a_sequence_costs() -> None:
    """Keys and values are read once, each row attends to those before it, rows without logits skip a part."""
    batch = replace(_batch([(3, 10), (1, 20)]), logits_rows=np.array([2, 3]))
    assert Costs(0.1).of(batch).tolist() == [3 + 1.3, 1 + 2.1]
    assert np.allclose(Costs(0, attend=0.1).of(batch), [3 + 1.1 + 1.2 + 1.3, 1 + 2.1])
    assert np.allclose(Costs(0, skipped=0.25).of(batch), [3 - 0.5, 1])


def test_sequences_that_cannot_be_dealt_evenly_stay_together() -> None:
    batch = _batch([(300, 0), (20, 0), (20, 0)])
    assert split(batch, 2, Costs(0.01))[0] is batch
    assert len(split(_batch([(20, 0)] * 6), 3, Costs(0.01))) == 3


def test_the_longest_item_comes_first() -> None:
    work = attention_work(_batch([(1, 10), (300, 0), (1, 400)]), 12, 2, 2)
    tiles, items = work.tiles, work.items
    cost = [(tiles[last - 1, 2] + 1) * (last - first) for first, last, *_ in items]
    assert cost == sorted(cost, reverse=True)
