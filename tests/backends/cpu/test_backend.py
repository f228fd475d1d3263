"""The CPU backend by itself: which rows get logits, and what memory it says it takes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from isologit.backends.base import LoadOptions
from isologit.backends.batch import FlatBatch
from isologit.backends.cpu.backend import CPUBackend
from isologit.backends.cpu.step import run_step
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.config import ModelConfig

CONFIG = ModelConfig(700, 48, 100, 2, 4, 2, 12, 64)
OPTIONS = LoadOptions(max_model_len=64, num_threads=2)


@pytest.fixture(scope="module")
def backend() -> CPUBackend:
    loaded = CPUBackend.load(dummy_checkpoint(CONFIG, seed=1), OPTIONS)
    loaded.allocate_kv(80)
    loaded.reserve(160)
    return loaded


def prompts(counts: list[int], wanted: list[bool]) -> FlatBatch:
    """One prompt of so many tokens each, all of whose rows have an argmax; `wanted` is repeated over the rows."""
    rows = sum(counts)
    index = np.arange(len(counts))
    firsts = np.cumsum(counts) - counts
    owner = np.repeat(index, counts)
    positions = np.arange(rows) - firsts[owner]
    return FlatBatch(
        token_ids=np.arange(rows) * 37 % CONFIG.vocab_size,
        positions=positions,
        slots=owner * CPUBackend.block_size + positions,
        sequences=np.stack([firsts, counts, np.zeros_like(index)], axis=1),
        block_tables=index[:, None],
        table_rows=index,
        logits_rows=np.arange(rows),
        logits_wanted=np.resize(np.array(wanted), rows),
    )


@pytest.mark.parametrize("counts", [[1], [3, 1, 2], [4] * 40])
@pytest.mark.parametrize("bounded", [True, False])
def test_rows_that_want_logits_get_them_and_change_no_other(
    backend: CPUBackend, counts: list[int], bounded: bool
) -> None:
    """Whatever the mix, and whether the other rows' tokens come from bounds or from all their logits."""
    everything = prompts(counts, [True])
    output = backend.forward(everything)
    logits, argmax, final = output.logits.copy(), output.argmax.copy(), output.final.copy()
    normalisers = backend.log_normalisers(output)
    assert np.array_equal(argmax, logits.argmax(1))
    assert np.array_equal(backend.project(final), logits)
    for mix in ([False], [True, False], [False, False, True], [True, True, True, False]):
        batch = prompts(counts, mix)
        backend._steps_without_bounds = 0 if bounded else 1
        found = backend.forward(batch)
        assert np.array_equal(found.argmax, argmax)
        assert np.array_equal(found.final, final)
        assert np.array_equal(found.logits, logits[batch.logits_wanted])
        assert np.array_equal(backend.log_normalisers(found), normalisers[batch.logits_wanted])
    backend._steps_without_bounds = 0


def test_rows_without_logits_are_not_projected(backend: CPUBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row that wants logits does not make the step compute all logits of the others."""
    projected: list[int] = []
    whole = backend._whole_rows

    def counted(final: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        projected.append(len(final))
        return whole(final)

    monkeypatch.setattr(backend, "_whole_rows", counted)
    if backend._byte_head is None:
        pytest.skip("this CPU multiplies no bytes, so all rows are always projected")
    batch = prompts([1] * 30, [False])
    backend.forward(batch)
    chosen_wholly = sum(projected)  # rows whose bounds left too much open
    backend.forward(replace(batch, logits_wanted=np.arange(30) == 7))
    assert sum(projected) <= 2 * chosen_wholly + 1


@pytest.mark.parametrize("wanted", [True, False])
def test_waiting_for_the_other_part_is_counted_and_named(
    backend: CPUBackend, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    """Threads with parts of their own, of which one is late: before the LM head, or before there are its bounds."""
    batch = prompts([2] * 40, [wanted])
    backend.forward(batch)
    assert len(backend._parts(batch)) == 2

    def late(thread: int, num_threads: int, part: int, *args: Any) -> None:
        time.sleep(0.03 * part)
        run_step(thread, num_threads, part, *args)

    monkeypatch.setattr("isologit.backends.cpu.backend.run_step", late)
    backend.reset_phases()
    for _ in range(4):
        backend.forward(batch)
    assert backend.phases()["wait"] > 0.06  # of the 0.12 s that it is late in all


def test_memory_is_known_before_it_is_taken(backend: CPUBackend) -> None:
    planned, taken = CPUBackend.plan_memory(CONFIG, OPTIONS, 160), backend.memory()
    assert planned.kv_block == taken.kv_block == backend._kv.nbytes // 80
    assert planned.step_buffers == taken.step_buffers
    assert planned.weights == taken.weights
