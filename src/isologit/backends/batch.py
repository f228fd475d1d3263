"""The flat token batch: what a step computes, whichever request and phase each token belongs to, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class FlatBatch:
    """T tokens of S sequences in a row; the tokens of one sequence are consecutive and in order.

    token_ids, positions: int64 [T]; a token id of -1 - r, only where `Backend.overlaps_steps`, is the argmax of the
    last step's logits row r, and any token if that is NaN. slots: int64 [T], where the token's keys and values go
    (block id * block size + offset). sequences: int64 [S, 3], first row, number of rows and first position of each
    sequence. block_tables: int64 [N, max blocks], one row of block ids for each place a running sequence can have, the
    same array from step to step: a row changes only when another sequence takes the place. table_rows: int64 [S], each
    sequence's row in it. logits_rows: int64 [R], ascending, rows whose argmax is wanted: of each sequence none or its
    last ones. logits_wanted: bool [R], which of them want their logits too.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    sequences: np.ndarray
    block_tables: np.ndarray
    table_rows: np.ndarray
    logits_rows: np.ndarray
    logits_wanted: np.ndarray


class StepOutput(Protocol):
    """What a step gives for its R logits rows, of which W want logits. Reading a field may wait for the device."""

    @property
    def argmax(self) -> np.ndarray:
        """int64 [R], index of the largest logit, the lowest on ties, -1 where there is NaN."""
        ...

    @property
    def final(self) -> np.ndarray:
        """float32 [R, hidden], the normed hidden states from which the LM head makes the logits."""
        ...

    @property
    def logits(self) -> np.ndarray:
        """float32 [W, vocab], of the rows that wanted them, in order."""
        ...


@dataclass(frozen=True)
class ReadyOutput:
    """The `StepOutput` of a device whose steps are over when `forward` returns."""

    argmax: np.ndarray
    final: np.ndarray
    logits: np.ndarray
