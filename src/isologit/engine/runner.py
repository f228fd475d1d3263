"""Turns a `StepPlan` into a flat batch and runs the backend on it. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from isologit.backends.base import Backend
from isologit.backends.batch import FlatBatch, StepOutput
from isologit.engine.scheduler import ScheduledSequence, StepPlan


@dataclass(frozen=True)
class StepResult:
    """Rows of one step. `first_rows[i]` is the first row that chooses a token of the plan's i-th sequence.

    The rows that score its prompt, `num_scored`, stand before it.
    """

    backend: Backend
    output: StepOutput
    first_rows: list[int]
    logits_wanted: np.ndarray  # bool [R]

    @property
    def argmax(self) -> np.ndarray:
        """int64 [R]."""
        return self.output.argmax

    def logits(self, row: int) -> np.ndarray:
        """float32 [vocab] of a logits row whose sequence wanted them; valid until the next step."""
        row_logits: np.ndarray = self.output.logits[self._places[row]]
        return row_logits

    def log_normaliser(self, row: int) -> float:
        """What the row's logits exceed its log-probabilities by; to be asked before the next step."""
        return float(self._log_normalisers[self._places[row]])

    @cached_property
    def _places(self) -> np.ndarray:
        """Where among the rows with logits a row is, int64 [R]; past the end for a row without."""
        assert self.logits_wanted.any(), "no row of the step wanted logits"
        places = np.cumsum(self.logits_wanted) - 1
        places[~self.logits_wanted] = len(places)
        return places

    @cached_property
    def _log_normalisers(self) -> np.ndarray:
        return self.backend.log_normalisers(self.output)


class BlockTables:
    """Block ids of the running sequences, one row of one array each; a row is written once, when its sequence comes."""

    def __init__(self) -> None:
        self.array = np.zeros((0, 0), np.int64)  # [places, most blocks]
        self._row_of: dict[str, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._row_of)

    def row_of(self, request_id: str, block_ids: list[int]) -> int:
        """The row of a sequence; `block_ids` are read when it is asked for first."""
        row = self._row_of.get(request_id)
        if row is not None:
            return row
        if not self._free or len(block_ids) > self.array.shape[1]:
            self._grow(len(block_ids))
        row = self._row_of[request_id] = self._free.pop()
        self.array[row, : len(block_ids)] = block_ids
        return row

    def forget(self, request_id: str) -> None:
        """The sequence has left; another may have its row."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free.append(row)

    def _grow(self, num_blocks: int) -> None:
        places, width = self.array.shape
        more = max(8, places) if not self._free else 0
        wider = num_blocks if num_blocks > width else 0
        grown = np.zeros((places + more, max(width, 2 * wider)), np.int64)
        grown[:places, :width] = self.array
        self.array = grown
        self._free += range(places, places + more)


class Runner:
    """Builds flat batches and runs them."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._tables = BlockTables()

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step of the model."""
        batch, first_rows = self.build(plan)
        return StepResult(self.backend, self.backend.forward(batch), first_rows, batch.logits_wanted)

    def forget(self, request_id: str) -> None:
        """The sequence has left: its place in the block tables is free."""
        self._tables.forget(request_id)

    def build(self, plan: StepPlan) -> tuple[FlatBatch, list[int]]:
        """Flat batch of a plan, and the index of each sequence's first logits row."""
        token_ids: list[int] = []
        sequences: list[tuple[int, int, int]] = []
        table_rows: list[int] = []
        first_rows: list[int] = []
        logits_rows: list[int] = []
        logits_wanted: list[bool] = []
        for scheduled in plan.sequences:
            seq, start, count = scheduled.seq, scheduled.start, scheduled.num_tokens
            sequences.append((len(token_ids), count, start))
            drafts = scheduled.draft_token_ids
            if count == 1 and not drafts:
                token_ids.append(seq.token_ids[start])
            else:
                token_ids += seq.token_ids[start : start + count - len(drafts)]
                token_ids += drafts
            first_rows.append(len(logits_rows) + scheduled.num_scored)
            num_rows = scheduled.num_scored + scheduled.num_logits
            logits_rows += range(len(token_ids) - num_rows, len(token_ids))
            logits_wanted += [_wants_logits(scheduled)] * num_rows
            table_rows.append(self._tables.row_of(seq.request.request_id, seq.block_ids))
        table = np.asarray(sequences, np.int64)
        first, counts, position = table.T
        owned_by, tables = np.asarray(table_rows, np.int64), self._tables.array
        positions = np.arange(len(token_ids)) + np.repeat(position - first, counts)
        block_size = self.backend.block_size
        blocks = tables[np.repeat(owned_by, counts), positions // block_size]
        batch = FlatBatch(
            token_ids=np.asarray(token_ids, np.int64),
            positions=positions,
            slots=blocks * block_size + positions % block_size,
            sequences=table,
            block_tables=tables,
            table_rows=owned_by,
            logits_rows=np.asarray(logits_rows, np.int64),
            logits_wanted=np.asarray(logits_wanted, bool),
        )
        return batch, first_rows


def _wants_logits(scheduled: ScheduledSequence) -> bool:
    """Whether this step must give the sequence's logits, beyond the index of the largest."""
    seq = scheduled.seq
    params = seq.request.params
    if scheduled.num_scored or params.return_logits or params.logprobs is not None:
        return True
    return seq.needs_row
