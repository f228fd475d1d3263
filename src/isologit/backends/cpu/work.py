"""How a CPU divides a flat batch: whole sequences among threads, and attention into tiles and items."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from isologit.backends.batch import FlatBatch

_TILES_PER_ITEM = 4  # more would use a head's keys and values oftener, fewer keep the last thread from waiting
_UNEVEN = 1.1  # a part that costs so many times the average is not worth waiting for


@dataclass(frozen=True)
class AttentionWork:
    """What the threads share in attention, int64.

    tiles [N, 5]: first row, rows, first position, row of the block tables, whether it holds all of the sequence's
    tokens. items [M, 4]: first and last + 1 of the tiles, first and last + 1 of the KV heads, the longest first. A
    sequence's only tile has its heads shared by the threads; several take one head at a time, whose keys and values
    then stay in the cache. written_first [W, 3]: sequences, as in `FlatBatch`, whose tokens are not all in one tile:
    their keys and values must be written before any tile is begun.
    """

    tiles: np.ndarray
    items: np.ndarray
    written_first: np.ndarray


@dataclass(frozen=True)
class Costs:
    """What a sequence of a thread's own part takes, as multiples of the products of one row.

    read: keys and values of a token from memory, once for all rows of the sequence. attend: a row's arithmetic with
    a token before it. skipped: what a row without logits saves in the last layer.
    """

    read: float
    attend: float = 0.0
    skipped: float = 0.0

    def of(self, batch: FlatBatch) -> np.ndarray:
        """Of each sequence of a batch, float64."""
        first_row, counts, position = batch.sequences.T
        first_logit, last_logit = np.searchsorted(batch.logits_rows, (first_row, first_row + counts))
        products = counts - self.skipped * (counts - (last_logit - first_logit))
        cost: np.ndarray = (
            products + self.read * (position + counts) + self.attend * counts * (position + (counts + 1) / 2)
        )
        return cost


def split(batch: FlatBatch, num_parts: int, costs: Costs) -> list[FlatBatch]:
    """`num_parts` batches that follow each other, of whole sequences and about the same cost, or this one alone.

    `argmax` and `final` of the parts' steps, one after the other, are those of this batch.
    """
    first_row, counts, _ = batch.sequences.T
    cost = np.append(0.0, np.cumsum(costs.of(batch)))
    wanted = cost[-1] * np.arange(num_parts + 1) / num_parts
    bounds = np.abs(cost - wanted[:, None]).argmin(axis=1)
    if np.diff(cost[bounds]).max() > _UNEVEN * wanted[1]:
        return [batch]
    parts = []
    for first, last in pairwise(bounds):
        start, end = first_row[first], first_row[last - 1] + counts[last - 1]
        first_logit, last_logit = np.searchsorted(batch.logits_rows, (start, end))
        parts.append(
            FlatBatch(
                token_ids=batch.token_ids[start:end],
                positions=batch.positions[start:end],
                slots=batch.slots[start:end],
                sequences=batch.sequences[first:last] - np.array([start, 0, 0]),
                block_tables=batch.block_tables,
                table_rows=batch.table_rows[first:last],
                logits_rows=batch.logits_rows[first_logit:last_logit] - start,
                logits_wanted=batch.logits_wanted[first_logit:last_logit],
            )
        )
    return parts


def attention_work(
    batch: FlatBatch, tokens_per_tile: int, num_kv_heads: int, num_threads: int, *, logits_only: bool = False
) -> AttentionWork:
    """The attention of all tokens, or only of those whose logits are wanted, in tiles of consecutive tokens."""
    if not logits_only and batch.sequences[:, 1].max() <= tokens_per_tile:
        return _one_tile_each(batch, num_kv_heads, num_threads)
    first_row, counts, position = batch.sequences.T
    wanted = counts
    if logits_only:
        ends = np.searchsorted(batch.logits_rows, np.append(first_row, first_row[-1] + counts[-1]))
        wanted = np.diff(ends)
    alone = (counts <= tokens_per_tile) & (wanted == counts)
    per_sequence = -(-wanted // tokens_per_tile)
    sequence, within = _enumerate(per_sequence)
    within = within * tokens_per_tile
    skipped = (counts - wanted)[sequence] + within
    tiles = np.stack(
        [
            first_row[sequence] + skipped,
            np.minimum(tokens_per_tile, wanted[sequence] - within),
            position[sequence] + skipped,
            batch.table_rows[sequence],
            alone[sequence],
        ],
        axis=1,
    )
    owner, chunk = _enumerate(-(-per_sequence // _TILES_PER_ITEM))
    ends = np.cumsum(per_sequence)
    first = ends[owner] - per_sequence[owner] + chunk * _TILES_PER_ITEM
    last = np.minimum(first + _TILES_PER_ITEM, ends[owner])
    longest_first = np.argsort(-(tiles[last - 1, 2] + 1) * (last - first), kind="stable")
    parts = np.where(per_sequence[owner] == 1, num_threads, num_kv_heads)[longest_first]
    unit, part = _enumerate(parts)
    parts, unit = parts[unit], longest_first[unit]
    items = np.stack(
        [first[unit], last[unit], part * num_kv_heads // parts, (part + 1) * num_kv_heads // parts], axis=1
    )
    return AttentionWork(tiles, items, batch.sequences[~alone])


def _one_tile_each(batch: FlatBatch, num_kv_heads: int, num_threads: int) -> AttentionWork:
    """The same for sequences of one tile each, as in nearly all steps: in a tenth of the time."""
    count = len(batch.sequences)
    tiles = np.ones((count, 5), np.int64)
    tiles[:, :3] = batch.sequences
    tiles[:, 3] = batch.table_rows
    longest_first = np.argsort(-batch.sequences[:, 2], kind="stable")
    bounds = np.arange(num_threads + 1) * num_kv_heads // num_threads
    items = np.empty((count, num_threads, 4), np.int64)
    items[:, :, 0] = longest_first[:, None]
    items[:, :, 1] = longest_first[:, None] + 1
    items[:, :, 2], items[:, :, 3] = bounds[:-1], bounds[1:]
    return AttentionWork(tiles, items.reshape(-1, 4), batch.sequences[:0])


def _enumerate(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner, and number within its owner's, of `counts[owner]` things for each owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
