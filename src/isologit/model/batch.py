"""The flat token batch: what a step computes, whichever request and phase each token belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_TILES_PER_ITEM = 8


@dataclass(frozen=True)
class FlatBatch:
    """T tokens of S sequences in a row; the tokens of one sequence are consecutive and in order.

    token_ids, positions: int64 [T]. slots: int64 [T], where the token's keys and values go (block id * block size +
    offset). sequences: int64 [S, 3], first row, number of rows and first position of each sequence. block_tables:
    int64 [S, max blocks], block ids by sequence. logits_rows: int64 [R], rows whose logits are wanted.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    sequences: np.ndarray
    block_tables: np.ndarray
    logits_rows: np.ndarray

    def attention_work(
        self, tokens_per_tile: int, num_kv_heads: int, num_threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tiles, items) of the attention, int64.

        tiles [N, 5]: first row, rows, first position, sequence, whether it is the sequence's only one in this step.
        items [M, 4]: first and last + 1 of the tiles, first and last + 1 of the KV heads. A tile that is alone has its
        heads shared by the threads; several tiles of a sequence take one head at a time, whose keys and values then
        stay in the cache. The longest items come first.
        """
        counts = self.sequences[:, 1]
        per_sequence = -(-counts // tokens_per_tile)
        sequence, within = _enumerate(per_sequence)
        within *= tokens_per_tile
        tiles = np.empty((len(sequence), 5), np.int64)
        tiles[:, 0] = self.sequences[sequence, 0] + within
        tiles[:, 1] = np.minimum(tokens_per_tile, counts[sequence] - within)
        tiles[:, 2] = self.sequences[sequence, 2] + within
        tiles[:, 3] = sequence
        tiles[:, 4] = per_sequence[sequence] == 1

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
        return tiles, items


def _enumerate(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner, and number within its owner's, of `counts[owner]` things for each owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
