"""Calibration finds again what a device's steps cost, on a clock that is advanced by that cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isologit.backends.batch import FlatBatch, ReadyOutput
from isologit.engine import calibration
from isologit.engine.calibration import measure_step_cost, measure_step_times
from isologit.engine.planner import StepCost, plan, simulate

TRUE = StepCost(
    calibration.CALIBRATION_ROWS,
    (0.010, 0.010, 0.010, 0.011, 0.013, 0.018, 0.031, 0.060),
    per_row_s=0.060 / 128,
    per_logits_row_s=5e-5,
    per_context_token_s=2e-6,
    per_prompt_pair_s=3e-7,
)


class Device:
    """A device whose steps take what `cost` says; `now` is its clock."""

    block_size = 16

    def __init__(self, cost: StepCost) -> None:
        self.cost, self.now, self.batches = cost, 0.0, list[FlatBatch]()

    def forward(self, batch: FlatBatch) -> ReadyOutput:
        counts, first = batch.sequences[:, 1], batch.sequences[:, 2]
        seen = counts * first + counts * (counts + 1) // 2
        is_prompt = counts > 1
        self.now += self.cost.step_s(
            len(batch.token_ids), len(batch.logits_rows), int(seen[~is_prompt].sum()), int(seen[is_prompt].sum())
        )
        self.batches.append(batch)
        chosen = np.zeros(len(batch.logits_rows), np.int64)
        return ReadyOutput(chosen, np.zeros((len(chosen), 8), np.float32), np.zeros((0, 32), np.float32))

    def project(self, final: np.ndarray) -> np.ndarray:
        return np.zeros((len(final), 32), np.float32)


def calibrated(
    monkeypatch: pytest.MonkeyPatch, cost: StepCost, *, max_rows: int = 128, num_blocks: int = 2048, max_len: int = 4096
) -> tuple[StepCost, Device]:
    device: Any = Device(cost)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: device.now)
    times = measure_step_times(device, 32, max_rows)
    return measure_step_cost(device, 32, times, num_blocks, max_len), device


def test_what_steps_cost_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = calibrated(monkeypatch, TRUE)
    assert found.rows == TRUE.rows
    host_s = 4e-4
    assert np.array(found.seconds) - host_s == pytest.approx(TRUE.seconds)
    assert found.per_row_s == pytest.approx(TRUE.per_row_s)
    assert found.per_logits_row_s == pytest.approx(TRUE.per_logits_row_s)
    assert found.per_context_token_s == pytest.approx(TRUE.per_context_token_s)
    assert found.per_prompt_pair_s == pytest.approx(TRUE.per_prompt_pair_s)


def test_a_workload_is_predicted_by_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = calibrated(monkeypatch, TRUE)
    lengths = [(20 + i % 50, 1 + 7 * i % 300) for i in range(200)]
    order = sorted(range(200), key=lambda i: -lengths[i][1])
    given = lengths, order, 48, 256, 4096, 16
    steps, seconds = simulate(*given, found)
    assert seconds - steps * 4e-4 == pytest.approx(simulate(*given, TRUE)[1])


@pytest.mark.parametrize(("max_rows", "num_blocks", "max_len"), [(1, 1, 16), (3, 3, 64), (128, 128, 40), (8, 40, 4096)])
def test_no_step_reaches_beyond_the_memory_or_the_longest_sequence(
    monkeypatch: pytest.MonkeyPatch, max_rows: int, num_blocks: int, max_len: int
) -> None:
    found, device = calibrated(monkeypatch, TRUE, max_rows=max_rows, num_blocks=num_blocks, max_len=max_len)
    for batch in device.batches:
        assert len(batch.token_ids) <= max_rows
        assert batch.positions.max() < max_len
        assert batch.slots.max() < num_blocks * device.block_size
        used = batch.block_tables[batch.table_rows[0]]
        assert used.max() < num_blocks
        for (first, count, position), row in zip(batch.sequences, batch.table_rows, strict=True):
            table = batch.block_tables[row]
            positions = np.arange(position, position + count)
            assert (batch.positions[first : first + count] == positions).all()
            slots = table[positions // device.block_size] * device.block_size + positions % device.block_size
            assert (batch.slots[first : first + count] == slots).all()
    assert min(found.seconds) > 0
    assert found.per_row_s > 0


def test_a_device_that_is_slow_is_asked_for_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = StepCost((1, 128), (0.4, 4.0), 0.03)
    found, device = calibrated(monkeypatch, slow)
    assert found.rows[-1] <= 8
    assert device.now < 20


@pytest.mark.parametrize(("max_rows", "sizes"), [(128, (1, 8)), (5, (1, 4)), (1, (1,))])
def test_one_row_that_takes_long_is_not_taken_for_what_every_row_costs(
    monkeypatch: pytest.MonkeyPatch, max_rows: int, sizes: tuple[int, ...]
) -> None:
    """A large model's single row waits for the weights, which the next rows share: more slots are worth it."""
    found, _ = calibrated(monkeypatch, StepCost((1, 128), (0.6, 4.0), 0.03), max_rows=max_rows)
    assert found.rows == sizes
    if max_rows == 128:
        assert plan([(20, 60)] * 64, num_blocks=999, block_size=16, cost=found).max_num_seqs >= 8
