"""Flat batches from plain lists, as the engine's runner would build them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isologit.backends.batch import FlatBatch

Part = tuple[list[int], int, list[int]]  # tokens of this step, first position, block ids of the sequence


def make_batch(
    parts: Sequence[Part], block_size: int, *, num_logits: Sequence[int] | None = None, wanted: bool = True
) -> FlatBatch:
    """A step of these sequences. num_logits: last rows of each that are logits rows, by default all."""
    counts = np.array([len(tokens) for tokens, _, _ in parts])
    ends = np.cumsum(counts)
    asked = counts if num_logits is None else np.asarray(num_logits)
    tables = np.zeros((len(parts), max(len(blocks) for _, _, blocks in parts)), np.int64)
    for row, (_, _, blocks) in enumerate(parts):
        tables[row, : len(blocks)] = blocks
    positions = np.concatenate([np.arange(start, start + len(tokens)) for tokens, start, _ in parts])
    owners = np.repeat(np.arange(len(parts)), counts)
    rows = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, asked, strict=True)])
    return FlatBatch(
        token_ids=np.concatenate([np.array(tokens, np.int64) for tokens, _, _ in parts]),
        positions=positions,
        slots=tables[owners, positions // block_size] * block_size + positions % block_size,
        sequences=np.stack([ends - counts, counts, np.array([start for _, start, _ in parts])], axis=1),
        block_tables=tables,
        table_rows=np.arange(len(parts)),
        logits_rows=rows,
        logits_wanted=np.full(len(rows), wanted),
    )
