"""Turns a `StepPlan` into tensors and runs the model on it. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from isologit.backends.batch import FlatBatch, StepOutput
from isologit.engine.sampler import needs_row
from isologit.engine.scheduler import ScheduledSequence, StepPlan


class StepModel(Protocol):
    """What the runner needs of a model."""

    block_size: int

    def forward(self, batch: FlatBatch) -> StepOutput:
        """One step; its arrays are views, valid until the next call."""

    def project(self, final: np.ndarray) -> np.ndarray:
        """Logits float32 [n, vocab] of rows of `StepOutput.final`."""

    def log_normalisers(self, rows: int) -> np.ndarray:
        """log(sum(exp(logits))) of the first rows of the last step, whose logits were wanted, float64 [rows]."""


@dataclass(frozen=True)
class StepResult:
    """Rows of one step. `first_rows[i]` is the first logits row of the plan's i-th sequence."""

    output: StepOutput
    first_rows: list[int]

    @property
    def argmax(self) -> np.ndarray:
        """int64 [R]."""
        return self.output.argmax

    @property
    def logits(self) -> np.ndarray:
        """float32 [R, vocab]; of a step whose logits were wanted."""
        assert self.output.logits is not None
        return self.output.logits


def _wants_logits(scheduled: ScheduledSequence) -> bool:
    """Whether this step must give the sequence's logits, beyond the index of the largest."""
    seq = scheduled.seq
    params = seq.request.params
    if not scheduled.num_logits:
        return False
    if params.return_logits or params.logprobs is not None:
        return True
    return seq.forced_tokens is None and needs_row(params, seq.num_output_tokens)


class Runner:
    """Builds flat batches; keeps each running sequence's block table as an array."""

    def __init__(self, model: StepModel) -> None:
        self.model = model
        self._tables: dict[str, np.ndarray] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step of the model."""
        batch, first_rows = self.build(plan)
        return StepResult(self.model.forward(batch), first_rows)

    def log_normalisers(self, result: StepResult) -> np.ndarray:
        """What a row's logits exceed its log-probabilities by, float64 [R]; of the last step only."""
        return self.model.log_normalisers(len(result.argmax))

    def forget(self, request_id: str) -> None:
        """The sequence has left: drop its block table."""
        self._tables.pop(request_id, None)

    def build(self, plan: StepPlan) -> tuple[FlatBatch, list[int]]:
        """Flat batch of a plan, and the index of each sequence's first logits row."""
        num_sequences = len(plan.sequences)
        token_ids: list[int] = []
        sequences = np.empty((num_sequences, 3), np.int64)
        first_rows: list[int] = []
        logits_rows: list[int] = []
        tables: list[np.ndarray] = []
        for i, scheduled in enumerate(plan.sequences):
            seq, start = scheduled.seq, scheduled.start
            sequences[i] = (len(token_ids), scheduled.num_tokens, start)
            drafts = scheduled.draft_token_ids
            if scheduled.num_tokens == 1 and not drafts:
                token_ids.append(seq.token_ids[start])
            else:
                token_ids += seq.token_ids[start : start + scheduled.num_tokens - len(drafts)]
                token_ids += drafts
            first_rows.append(len(logits_rows))
            logits_rows += range(len(token_ids) - scheduled.num_logits, len(token_ids))
            table = self._tables.get(seq.request.request_id)
            if table is None:
                table = self._tables[seq.request.request_id] = np.asarray(seq.block_ids, np.int64)
            tables.append(table)
        lengths = [len(table) for table in tables]
        block_tables = np.zeros((num_sequences, max(lengths)), np.int64)
        filled = np.arange(block_tables.shape[1]) < np.asarray(lengths)[:, None]
        block_tables[filled] = np.concatenate(tables)
        counts = sequences[:, 1]
        owner = np.repeat(np.arange(num_sequences), counts)
        positions = np.arange(len(token_ids)) - sequences[owner, 0] + sequences[owner, 2]
        block_size = self.model.block_size
        slots = block_tables[owner, positions // block_size] * block_size + positions % block_size
        batch = FlatBatch(
            token_ids=np.asarray(token_ids, np.int64),
            positions=positions,
            slots=slots,
            sequences=sequences,
            block_tables=block_tables,
            logits_rows=np.asarray(logits_rows, np.int64),
            whole_logits=any(_wants_logits(scheduled) for scheduled in plan.sequences),
        )
        return batch, first_rows
