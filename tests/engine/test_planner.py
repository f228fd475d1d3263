"""The planner's event-driven simulation against the scheduler itself, and against known numbers of the contest."""

from __future__ import annotations

import csv
import heapq
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isologit.engine.blocks import BlockPool
from isologit.engine.planner import StepCost, plan, simulate
from isologit.engine.request import GenerationRequest, SamplingParams, Sequence
from isologit.engine.scheduler import Scheduler, SchedulerConfig
from isologit.errors import ConfigError

COST = StepCost((0,), (0.5,), per_row_s=0.25)
RICH = StepCost(
    (1, 2, 8), (1.0, 1.125, 3.0), 0.5, per_logits_row_s=0.25, per_context_token_s=2.0, per_prompt_pair_s=8.0
)
MANY = 10**6
TRACE = Path(__file__).parents[3] / "shared" / "data" / "contest_lengths.csv"


def schedule_for_real(
    lengths: list[tuple[int, int]],
    order: list[int],
    slots: int,
    budget: int,
    blocks: int,
    block_size: int,
    cost: StepCost = COST,
) -> tuple[int, float]:
    """Steps and seconds of the true scheduler on requests of these lengths."""
    pool = BlockPool(blocks, block_size, enable_prefix_caching=False)
    scheduler = Scheduler(SchedulerConfig(slots, budget, (), MANY), pool)
    for i in order:
        prompt, max_tokens = lengths[i]
        scheduler.add(Sequence(GenerationRequest(str(i), [1] * prompt, SamplingParams(max_tokens=max_tokens))))
    steps, seconds = 0, 0.0
    while (step := scheduler.schedule()) is not None:
        steps += 1
        context = pairs = 0
        for entry in step.sequences:
            seen = sum(range(entry.start + 1, entry.start + entry.num_tokens + 1))
            is_prompt = entry.start < len(entry.seq.request.prompt_token_ids)
            context, pairs = context + seen * (not is_prompt), pairs + seen * is_prompt
        seconds += cost.step_s(step.num_tokens, sum(entry.num_logits for entry in step.sequences), context, pairs)
        scheduler.commit(step, [[1] * entry.num_logits for entry in step.sequences])
    return steps, seconds


@settings(max_examples=200, deadline=None)
@given(data=st.data(), lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=12))
def test_simulation_agrees_with_the_scheduler(data: st.DataObject, lengths: list[tuple[int, int]]) -> None:
    slots, block_size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    budget = slots + data.draw(st.integers(0, 20))
    largest = max((-(-(sum(item) - 1) // block_size) for item in lengths), default=1)
    blocks = max(1, largest) + data.draw(st.integers(0, 20))
    order = data.draw(st.permutations(range(len(lengths))))
    given = lengths, order, slots, budget, blocks, block_size, RICH
    steps, seconds = simulate(*given)
    assert (steps, pytest.approx(seconds)) == schedule_for_real(*given)


def test_between_measured_sizes_a_step_costs_what_a_straight_line_says_and_beyond_them_the_same_for_each_row() -> None:
    assert [COST.rows_s(rows) for rows in (1, 4, 8)] == [0.75, 1.5, 2.5]
    assert [RICH.rows_s(rows) for rows in (1, 2, 4, 8, 10)] == [1.0, 1.125, 1.75, 3.0, 4.0]
    assert RICH.step_s(4, 3, 100, 10) == 1.75 + 3 * 0.25 + 100 * 2.0 + 10 * 8.0


def test_a_line_with_the_largest_intercept_touches_the_steps_from_below() -> None:
    assert RICH.intercept_s(0.0) == 1.0
    assert RICH.intercept_s(0.3125) == pytest.approx(0.5)  # through two rows and eight
    assert RICH.intercept_s(0.75) == -math.inf  # beyond the last size a row costs less


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        simulate([(1, 1)], [0], 4, 3, 8, 2, COST)
    with pytest.raises(ConfigError, match="key/value blocks"):
        plan([(8, 8)], num_blocks=7, block_size=2, cost=COST)
    with pytest.raises(ConfigError):
        plan([(8, 8)], num_blocks=8, block_size=2, cost=COST, max_num_seqs=8, max_num_batched_tokens=4)


def test_no_requests() -> None:
    chosen = plan([], num_blocks=4, block_size=2, cost=COST)
    assert (chosen.order, chosen.predicted_steps, chosen.predicted_seconds) == ([], 0, 0.0)
    assert chosen.max_num_batched_tokens >= chosen.max_num_seqs >= 1


def test_given_settings_are_kept_and_the_order_is_longest_first() -> None:
    lengths = [(3, 2), (1, 9), (4, 9), (2, 5)]
    chosen = plan(lengths, num_blocks=64, block_size=2, cost=COST, max_num_seqs=3, max_num_batched_tokens=20)
    assert (chosen.max_num_seqs, chosen.max_num_batched_tokens, chosen.order) == (3, 20, [2, 1, 3, 0])
    assert chosen.predicted_steps == schedule_for_real(lengths, chosen.order, 3, 20, 64, 2)[0]
    given_order = plan(lengths, num_blocks=64, block_size=2, cost=COST, longest_first=False)
    assert given_order.order == [0, 1, 2, 3]
    assert plan(lengths, num_blocks=64, block_size=2, cost=COST, max_num_batched_tokens=2).max_num_seqs <= 2


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30),
    cost=st.sampled_from(
        [
            RICH,
            *(StepCost((0,), (1.0,), per_row) for per_row in (0.0, 0.05, 0.3, 1.0)),
            StepCost((1, 8), (1.0, 1.5), 0.2),
        ]
    ),
)
def test_no_setting_of_the_grid_is_more_than_one_percent_better(lengths: list[tuple[int, int]], cost: StepCost) -> None:
    chosen = plan(lengths, num_blocks=60, block_size=4, cost=cost)
    for slots in {1, 2, 4, 8, 16, len(lengths)}:
        for budget in (256, 2048):
            _, seconds = simulate(lengths, chosen.order, slots, budget, 60, 4, cost)
            assert chosen.predicted_seconds <= seconds * 1.01 + 1e-9


def test_slots_follow_the_hardware() -> None:
    lengths = [(10, 20)] * 64
    rows_are_free = plan(lengths, num_blocks=MANY, block_size=4, cost=StepCost((0,), (1.0,), 0.0))
    assert rows_are_free.max_num_seqs == 64
    rows_are_everything = plan(lengths, num_blocks=MANY, block_size=4, cost=StepCost((0,), (0.0,), 1.0))
    assert rows_are_everything.max_num_seqs == 1


@pytest.mark.skipif(not TRACE.exists(), reason="the contest's length trace is not here")
class TestContestTrace:
    @staticmethod
    def lengths(column: str = "max_new_tokens") -> list[tuple[int, int]]:
        with TRACE.open() as file:
            return [(int(row["prompt_tokens_with_bos"]), int(row[column])) for row in csv.DictReader(file)]

    @pytest.mark.parametrize(
        ("slots", "longest_first", "steps"), [(128, False, 1090), (128, True, 768), (193, True, 510), (256, True, 504)]
    )
    def test_steps(self, slots: int, longest_first: bool, steps: int) -> None:
        lengths = self.lengths()
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i][1]) if longest_first else range(len(lengths))
        assert simulate(lengths, order, slots, MANY, MANY, 16, COST)[0] == steps
        # The same by list scheduling on machines, without any notion of a step (Graham 1969).
        machines = [0] * slots
        for i in order:
            heapq.heapreplace(machines, machines[0] + lengths[i][1])
        assert max(machines) == steps

    def test_archived_answers_longest_first(self) -> None:
        lengths = [item for item in self.lengths("archived_answer_tokens") if item[1] > 0]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i][1])
        assert simulate(lengths, order, 128, MANY, MANY, 16, COST)[0] == 760
        assert simulate(lengths, order, 194, MANY, MANY, 16, COST)[0] == 504

    def test_one_simulation_is_quick(self) -> None:
        lengths = self.lengths()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            simulate(lengths, range(len(lengths)), 128, 512, MANY, 16, COST)
            times.append(time.perf_counter() - start)
        assert min(times) < 0.03

    def test_free_rows_reach_the_floor(self) -> None:
        chosen = plan(self.lengths(), num_blocks=MANY, block_size=16, cost=StepCost((0,), (1e-2,), 1e-6))
        assert chosen.predicted_steps <= 504 * 1.01
        assert chosen.max_num_seqs <= 256
