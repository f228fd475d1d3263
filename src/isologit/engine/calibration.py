"""What steps of different sizes cost on this machine: measured once, used by the planner and by speculation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isologit.backends.base import Backend
from isologit.backends.batch import FlatBatch
from isologit.engine.planner import StepCost

CALIBRATION_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_HOST_SECONDS = 4e-4  # scheduling, building the batch and committing one step
_SECONDS_EACH = 0.15
_LEAST_TIMES, _MOST_TIMES = 2, 7
_LONGEST_STEP_S = 0.5
_SLOW_ROWS = (
    8  # measured however slow a step is: one row alone says what reading the weights takes, not what a row does
)
_CONTEXT_TOKENS = 1024  # of the steps that show what attention costs
_LEAST_ROW_S = 1e-9


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


def measure_step_times(model: Backend, vocab_size: int, max_rows: int) -> StepTimes:
    """Time decode steps of up to `max_rows` rows, each a sequence of its own with a context of one block.

    The model needs memory for `max_rows` blocks and buffers for `max_rows` rows. Takes about a second; of a model whose
    steps take more than half of one, sizes are left out.
    """
    rows: list[int] = []
    seconds: list[float] = []
    for count in CALIBRATION_ROWS:
        is_slow = bool(seconds) and seconds[-1] > _LONGEST_STEP_S
        if count > max_rows or (is_slow and rows[-1] >= _SLOW_ROWS):
            break
        if is_slow and count < _SLOW_ROWS and 2 * count <= max_rows:
            continue
        (median,) = _median_seconds(model, [_decode_batch(model, vocab_size, count)])
        rows.append(count)
        seconds.append(max([median, *seconds]))
    return StepTimes(tuple(rows), tuple(seconds))


def measure_step_cost(
    model: Backend, vocab_size: int, times: StepTimes, num_blocks: int, max_model_len: int
) -> StepCost:
    """What the planner needs besides `times`: how LM head, context and prompts share in a step of the largest size.

    Four steps of that size are timed in turns: as in `times`; with a single row's token chosen; with a long context;
    and a prompt's last rows. Their differences say what one token of each costs. The model needs memory for
    `num_blocks` blocks, as many as the size has rows at least. Takes a second or two, where steps are slow ten of them.
    """
    rows, block = times.rows[-1], model.block_size
    longest = min(max_model_len // block, _CONTEXT_TOKENS // block)
    blocks_each = max(1, min(longest, num_blocks // rows))
    prompt_blocks = max(-(-rows // block), min(longest, num_blocks))
    batches = [
        _decode_batch(model, vocab_size, rows),
        _decode_batch(model, vocab_size, rows, logits_rows=1),
        _decode_batch(model, vocab_size, rows, blocks_each=blocks_each),
    ]
    if prompt_blocks <= num_blocks and prompt_blocks * block <= max_model_len:
        batches.append(_prompt_batch(vocab_size, rows, prompt_blocks, block))
    plain, one_token, long, *prompt = _median_seconds(model, batches)
    per_logits_row_s = max(0.0, plain - one_token) / max(1, rows - 1)
    per_context_token_s = max(0.0, long - plain) / max(1, rows * (blocks_each - 1) * block)
    each_s = per_logits_row_s + per_context_token_s * block  # of a row in `times`
    seconds = [max(0.0, step_s - rows * each_s) for rows, step_s in zip(times.rows, times.seconds, strict=True)]
    pairs = rows * (prompt_blocks * block - rows) + rows * (rows + 1) // 2
    attention_s = (prompt[0] - one_token + per_context_token_s * rows * block) if prompt else 0.0
    return StepCost(
        rows=times.rows,
        seconds=tuple(step_s + _HOST_SECONDS for step_s in seconds),
        per_row_s=max(seconds[-1] / rows, _LEAST_ROW_S),
        per_logits_row_s=per_logits_row_s,
        per_context_token_s=per_context_token_s,
        per_prompt_pair_s=max(0.0, attention_s) / pairs,
    )


def _median_seconds(model: Backend, batches: Sequence[FlatBatch]) -> list[float]:
    """Of steps of each batch, run in turns."""
    times: list[list[float]] = [[] for _ in batches]
    for batch in batches:
        model.project(model.forward(batch).final[:1])  # compiled, and so never in a run
    while len(times[0]) < _LEAST_TIMES or (len(times[0]) < _MOST_TIMES and sum(times[0]) < _SECONDS_EACH):
        for batch, taken in zip(batches, times, strict=True):
            start = time.perf_counter()
            model.forward(batch).argmax  # noqa: B018 (waits for a device that computes on its own)
            taken.append(time.perf_counter() - start)
    return [float(np.median(taken)) for taken in times]


def _decode_batch(
    model: Backend, vocab_size: int, rows: int, *, blocks_each: int = 1, logits_rows: int | None = None
) -> FlatBatch:
    """The last token of `rows` sequences of so many full blocks, of which `logits_rows` (all) get a next token."""
    index = np.arange(rows)
    last = blocks_each * model.block_size - 1
    tables = np.arange(rows * blocks_each).reshape(rows, blocks_each)
    chosen = index[: rows if logits_rows is None else logits_rows]
    return FlatBatch(
        token_ids=index % vocab_size,
        positions=np.full(rows, last),
        slots=tables[:, -1] * model.block_size + model.block_size - 1,
        sequences=np.stack([index, np.ones_like(index), np.full(rows, last)], axis=1),
        block_tables=tables,
        table_rows=index,
        logits_rows=chosen,
        logits_wanted=np.zeros(len(chosen), bool),
    )


def _prompt_batch(vocab_size: int, rows: int, blocks: int, block_size: int) -> FlatBatch:
    """The last `rows` tokens of a prompt that fills so many blocks."""
    index = np.arange(rows)
    first = blocks * block_size - rows
    return FlatBatch(
        token_ids=index % vocab_size,
        positions=first + index,
        slots=first + index,
        sequences=np.array([[0, rows, first]]),
        block_tables=np.arange(blocks)[None, :],
        table_rows=np.zeros(1, np.int64),
        logits_rows=index[-1:],
        logits_wanted=np.zeros(1, bool),
    )
