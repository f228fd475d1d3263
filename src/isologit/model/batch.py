"""The flat token batch: what a step computes, whichever request and phase each token belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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

    def tiles(self, tokens_per_tile: int) -> np.ndarray:
        """Attention work items, int64 [N, 5]; longest context first.

        Columns: first row, rows, first position, sequence, and whether it is the sequence's only one in this step.
        """
        counts = self.sequences[:, 1]
        per_sequence = -(-counts // tokens_per_tile)
        sequence = np.repeat(np.arange(len(counts)), per_sequence)
        ends = np.cumsum(per_sequence)
        within = (np.arange(len(sequence)) - np.repeat(ends - per_sequence, per_sequence)) * tokens_per_tile
        tiles = np.empty((len(sequence), 5), np.int64)
        tiles[:, 0] = self.sequences[sequence, 0] + within
        tiles[:, 1] = np.minimum(tokens_per_tile, counts[sequence] - within)
        tiles[:, 2] = self.sequences[sequence, 2] + within
        tiles[:, 3] = sequence
        tiles[:, 4] = per_sequence[sequence] == 1
        return tiles[np.argsort(-tiles[:, 2], kind="stable")]
