"""What steps of different sizes cost on this machine: measured once, used by the planner and by speculation."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from isologit.backends.base import Backend
from isologit.backends.batch import FlatBatch
from isologit.engine.planner import StepCost

CALIBRATION_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_HOST_SECONDS = 2e-4  # scheduling and commit of one step
_SECONDS_EACH = 0.15
_LEAST_TIMES, _MOST_TIMES = 2, 7
_LONGEST_STEP_S = 0.5


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step by its number of rows; both ascend."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def seconds_of(self, rows: int) -> float:
        """Interpolated; beyond the last, in proportion."""
        if rows > self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, self.seconds))

    def row_cost(self, rows: int) -> float:
        """Time of one more row in a step of `rows` rows, relative to the time a token costs in it.

        1 where arithmetic is the limit: beyond the last measured size another row costs as much as any.
        """
        rows = max(1, rows)
        if rows >= self.rows[-1]:
            return 1.0
        now = self.seconds_of(rows)
        return (self.seconds_of(rows + 1) - now) / (now / rows)

    def step_cost(self) -> StepCost:
        """The straight line from the smallest step to the largest, with the host's share."""
        (first, *_, last), (least, *_, most) = self.rows + self.rows[-1:], self.seconds + self.seconds[-1:]
        per_row = (most - least) / (last - first) if last > first else least
        return StepCost(fixed_s=least + _HOST_SECONDS, per_row_s=max(per_row, 1e-9))


def measure_step_times(model: Backend, vocab_size: int, max_rows: int) -> StepTimes:
    """Time decode steps of up to `max_rows` rows, each a sequence of its own with a context of one block.

    The model needs memory for `max_rows` blocks and buffers for `max_rows` rows. Takes about a second.
    """
    rows: list[int] = []
    seconds: list[float] = []
    for count in CALIBRATION_ROWS:
        if count > max_rows or (seconds and seconds[-1] > _LONGEST_STEP_S):
            break
        batch = _decode_batch(count, vocab_size, model.block_size)
        model.project(model.forward(batch).final[:1])  # compiled, and so never in a run
        times: list[float] = []
        while len(times) < _LEAST_TIMES or (len(times) < _MOST_TIMES and sum(times) < _SECONDS_EACH):
            start = time.perf_counter()
            model.forward(batch).argmax  # noqa: B018 (waits for a device that computes on its own)
            times.append(time.perf_counter() - start)
        rows.append(count)
        seconds.append(max([float(np.median(times)), *seconds]))
    return StepTimes(tuple(rows), tuple(seconds))


def _decode_batch(rows: int, vocab_size: int, block_size: int) -> FlatBatch:
    index = np.arange(rows)
    position = block_size - 1
    return FlatBatch(
        token_ids=index % vocab_size,
        positions=np.full(rows, position),
        slots=index * block_size + position,
        sequences=np.stack([index, np.ones_like(index), np.full(rows, position)], axis=1),
        block_tables=index[:, None],
        table_rows=index,
        logits_rows=index,
        logits_wanted=np.zeros(rows, bool),
    )
