"""Two steps at once: the same results as one after the other, blocks accounted for, and proof that they overlap.

The scheduler with a toy model first (`test_scheduler` drives it), then the whole engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.backends.toy.thread import ThreadBackend
from tests.engine.test_scheduler import EOS, TOKENS, ToyResult, ToyRunner, ask, assert_same_as_alone, make, run

from isologit import LLM, GenerationRequest, RequestOutput, SamplingParams
from isologit.backends.registry import BACKENDS
from isologit.backends.torch.backend import TorchBackend
from isologit.config import ModelConfig
from isologit.engine.captured_rows import LAST_TOKEN
from isologit.engine.request import Sequence
from isologit.engine.scheduler import Scheduler, StepPlan
from isologit.engine.speculation import NGramProposer

# -- the scheduler --------------------------------------------------------------------------------------------------


@st.composite
def foreseen_requests(draw: st.DrawFn) -> list[GenerationRequest]:
    shared = draw(st.lists(TOKENS, max_size=8))
    listed = []
    for i in range(draw(st.integers(1, 8))):
        prompt = shared[: draw(st.integers(0, len(shared)))] + draw(st.lists(TOKENS, min_size=1, max_size=6))
        stops = draw(st.lists(TOKENS, max_size=1))
        params = SamplingParams(draw(st.integers(0, 12)), stop_token_ids=stops, ignore_eos=draw(st.booleans()))
        replay = draw(st.one_of(st.none(), st.none(), st.lists(TOKENS, max_size=12)))
        listed.append(GenerationRequest(str(i), prompt, params, replay_token_ids=replay))
    return listed


@settings(max_examples=100, deadline=None)
@given(data=st.data(), requests=foreseen_requests())
def test_blocks_are_conserved_and_texts_are_those_of_one_step_after_the_other(
    data: st.DataObject, requests: list[GenerationRequest]
) -> None:
    """`run` holds the pool to its accounts after every step, and finds a row that reads what is not its own."""
    slots, block_size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    largest = max(-(-(Sequence(r).max_total_tokens - 1) // block_size) for r in requests)
    scheduler = make(
        slots=slots,
        budget=slots + data.draw(st.integers(0, 8)),
        blocks=max(1, largest) + data.draw(st.integers(0, 12)),
        block_size=block_size,
        caching=data.draw(st.booleans()),
    )
    ids = st.sampled_from([request.request_id for request in requests])
    aborts = data.draw(st.dictionaries(st.integers(0, 20), ids, max_size=3))
    late = data.draw(st.integers(0, len(requests)))
    outcome = run(scheduler, requests, aborts, late, overlaps=True)
    assert_same_as_alone(outcome, requests)


LONG = [ask(str(i), [1, 2, 3, i % 5], 4 + i, ignore_eos=True) for i in range(9)]


@pytest.mark.parametrize("slots", [1, 2, 9])
def test_ends_by_length_are_foreseen_and_cost_no_step(slots: int) -> None:
    plain, ahead = (run(make(slots=slots, caching=False), LONG, overlaps=overlaps) for overlaps in (False, True))
    assert (ahead.num_steps, ahead.num_passed_over) == (plain.num_steps, 0)
    assert (ahead.num_ahead, plain.num_ahead) == (ahead.num_steps - 1, 0)


def test_an_end_that_nobody_foresaw_costs_one_row() -> None:
    requests = [ask(str(i), [i % 5, 2], 30) for i in range(9)]
    outcome = run(make(), requests, overlaps=True)
    assert_same_as_alone(outcome, requests)
    ended = [seq for seq in outcome.outputs.values() if seq.token_ids[-1] in EOS]
    assert len(ended) == outcome.num_passed_over > 3


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0}, {"repetition_penalty": 1.1}, {"logit_bias": {1: 1.0}}, {"allowed_token_ids": [1, 2]},
        {"bad_words": ["a"]}, {"min_tokens": 2}, {"logprobs": 0}, {"prompt_logprobs": 0}, {"return_logits": True},
    ],
)  # fmt: skip
def test_a_request_that_needs_logits_goes_through_one_step_after_the_other(params: dict[str, Any]) -> None:
    """It is not admitted ahead, nor does it wait for those that are; they run ahead before it comes and after it."""
    lengths = {"long": 30, "a": 2, "b": 2}
    plain = [ask(name, [1], length, ignore_eos=True) for name, length in lengths.items()]
    needs = ask("needs", [2], 6, ignore_eos=True, **params)
    assert run(make(slots=5), plain, late=2, overlaps=True).num_ahead == 29
    outcome = run(make(slots=5), [*plain, needs], late=3, overlaps=True)
    assert outcome.num_ahead == 29 - 7  # the step that admits it, and those it takes part in
    assert list(outcome.outputs) == ["a", "b", "needs", "long"]
    assert run(make(), [needs], overlaps=True).num_ahead == 0


def test_no_step_runs_ahead_while_a_draft_may_be_worth_its_row() -> None:
    def cost(rows: int) -> float:
        return 1.0 if rows > 4 else 0.0

    requests = [ask(str(i), [1, 2, 3, i % 5], 30 if i % 3 else 5, ignore_eos=True) for i in range(6)]
    scheduler = make(slots=6, budget=64, blocks=128, proposer=NGramProposer(cost, max_draft=4))
    outcome = run(scheduler, requests, overlaps=True)
    assert outcome.num_ahead == 5  # then four are left
    assert outcome.num_draft_tokens > 0
    assert_same_as_alone(outcome, requests)


class ForeseesEverything(Scheduler):
    def foresees(self, plan: StepPlan) -> bool:
        return True


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"min_tokens": 12}])
def test_foreseeing_what_the_host_decides_is_caught(params: dict[str, Any]) -> None:
    requests = [ask(str(i), [1, i % 5], 12, **params) for i in range(6)]
    assert_same_as_alone(run(make(), requests, overlaps=True), requests)
    with pytest.raises(AssertionError):
        assert_same_as_alone(run(make(scheduler=ForeseesEverything), requests, overlaps=True), requests)


@dataclass
class WritesLate(ToyRunner):
    """A device on which a step's writes come again after those of the step behind it."""

    pending: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def execute(self, plan: StepPlan) -> ToyResult:
        before = dict(self.memory)
        result = super().execute(plan)
        written = {slot: prefix for slot, prefix in self.memory.items() if before.get(slot) != prefix}
        self.memory.update(self.pending)
        self.pending = written
        return result


def test_blocks_go_on_at_once_because_steps_run_in_order() -> None:
    requests = [ask(str(i), [i % 5, 2], 20) for i in range(9)]
    outcome = run(make(blocks=22), requests, overlaps=True)
    assert_same_as_alone(outcome, requests)
    assert outcome.num_passed_over > 3
    with pytest.raises(AssertionError, match="another sequence's prefix"):
        run(make(blocks=22), requests, overlaps=True, runner_class=WritesLate)


# -- the engine -----------------------------------------------------------------------------------------------------

CONFIG = ModelConfig(120, 32, 48, 2, 4, 2, 8, 64)


@pytest.fixture
def thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """A model on a device that is a thread of its own."""
    monkeypatch.setitem(BACKENDS, "thread", "tests.backends.toy.thread:ThreadBackend")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf_dict()))
    made = LLM(tmp_path, load_format="dummy", backend="thread", max_num_seqs=4, speculative_config=None)
    yield made
    made.close()


def random_requests(**params: Any) -> list[GenerationRequest]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 10).tolist()
    return [
        GenerationRequest(str(i), rng.integers(3, 120, 1 + i).tolist(), SamplingParams(max_tokens=n, **params))
        for i, n in enumerate(lengths)
    ]


def outputs_of(llm: LLM, asked: list[GenerationRequest]) -> list[RequestOutput]:
    outputs = {output.request_id: output for output in llm.run(asked)}
    return [outputs[request.request_id] for request in asked]


@pytest.mark.parametrize("overlaps", [True, False])
def test_the_next_step_is_started_while_the_device_computes_this_one(
    thread: LLM, monkeypatch: pytest.MonkeyPatch, overlaps: bool
) -> None:
    """The device holds each step back until the next one is there, or somebody waits for its results."""
    monkeypatch.setattr(ThreadBackend, "overlaps_steps", overlaps)
    thread.warm_up()
    ThreadBackend.started.clear()
    outputs_of(thread, random_requests())
    followed = [step.is_followed for step in ThreadBackend.started]
    assert len(followed) > 10
    assert followed == [overlaps] * (len(followed) - 1) + [False]


@pytest.mark.parametrize("slots", [1, 3, 10])
def test_ends_at_tokens_at_any_number_of_slots(thread: LLM, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    thread.options = replace(thread.options, max_num_seqs=slots)
    free = outputs_of(thread, random_requests())
    stops = sorted({output.token_ids[len(output.token_ids) // 2] for output in free[::2]})
    ahead = outputs_of(thread, random_requests(stop_token_ids=stops))
    monkeypatch.setattr(ThreadBackend, "overlaps_steps", False)
    plain = outputs_of(thread, random_requests(stop_token_ids=stops))
    assert [(a.token_ids, a.finish_reason) for a in ahead] == [(b.token_ids, b.finish_reason) for b in plain]
    assert {output.finish_reason for output in plain} == {"stop", "length"}
    assert len({len(output.token_ids) for output in plain}) > 4


class Watched(TorchBackend):
    """Counts steps that were given a token that the last one was still to choose."""

    num_ahead: ClassVar[int] = 0

    def forward(self, batch: Any) -> Any:
        Watched.num_ahead += bool(batch.token_ids.min() < 0)
        return super().forward(batch)


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    """The demo model, which ends its answers, with a tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "watched", f"{__name__}:Watched")
        made = LLM(backend="watched", num_threads=1, speculative_config=None, max_num_seqs=3)
        yield made
        made.close()


TASKS = ("Describe the fox.", "List three animals.", "Count from 3 to 9.", "Describe the owl.", "Describe the fox.")


def asked(llm: LLM, **params: Any) -> list[GenerationRequest]:
    assert llm.tokenizer is not None
    sampling = SamplingParams(**{"max_tokens": 40, **params})
    capture = frozenset({0, 3, LAST_TOKEN})
    prompts = [llm.tokenizer.encode(f"{task}\n") for task in TASKS]
    return [GenerationRequest(str(i), prompt, sampling, capture=capture) for i, prompt in enumerate(prompts)]


def both_ways(llm: LLM, requests: list[GenerationRequest]) -> tuple[list[RequestOutput], list[RequestOutput]]:
    """Outputs with steps that overlap, of which there were some, and without."""
    before = Watched.num_ahead
    ahead = outputs_of(llm, requests)
    assert Watched.num_ahead > before + 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watched, "overlaps_steps", False)
        before = Watched.num_ahead
        plain = outputs_of(llm, requests)
        assert Watched.num_ahead == before
    return ahead, plain


@pytest.mark.parametrize("params", [{}, {"ignore_eos": True}, {"stop": ["e", "qq"]}, {"max_tokens": 7}])
def test_texts_ends_and_captured_rows(demo: LLM, params: dict[str, Any]) -> None:
    for a, b in zip(*both_ways(demo, asked(demo, **params)), strict=True):
        assert (a.token_ids, a.text) == (b.token_ids, b.text)
        assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
        assert list(a.captured) == list(b.captured)
        for index, row in a.captured.items():
            assert np.abs(row - b.captured[index]).max() < 1e-4


def test_requests_cancelled_in_flight_and_others_that_come(demo: LLM) -> None:
    """As a server does it: between steps, while one is in flight."""
    free = {output.request_id: output.token_ids for output in outputs_of(demo, asked(demo, ignore_eos=True))}
    loop = demo.open_loop(keep_hidden=True)
    queue = asked(demo, ignore_eos=True)
    gained: dict[str, list[int]] = {}
    done: dict[str, RequestOutput] = {}
    for request in queue[:3]:
        loop.add(request)
    for step in range(1000):
        if not loop.has_work():
            break
        if step in (3, 5):
            gone = loop.abort(str(step - 3))
            assert gone is not None
            done[gone.request_id] = gone
            loop.add(queue[step // 2 + 2])  # takes the slot and the blocks
        done.update((output.request_id, output) for output in loop.step())
        for delta in loop.deltas:
            assert delta.hidden is not None
            assert delta.hidden.shape == (1, demo.config.hidden_size)
            gained.setdefault(delta.request_id, []).extend(delta.token_ids)
        loop.scheduler.check_integrity()
    assert loop.scheduler.blocks.num_free == loop.scheduler.blocks.num_blocks
    assert set(done) == set(free)
    for name, output in done.items():
        assert output.token_ids == gained[name] == free[name][: len(gained[name])]
        assert (output.finish_reason == "abort") == (len(gained[name]) < len(free[name]))


def test_a_failed_step_takes_the_one_ahead_with_it(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = demo.open_loop()
    loop.add(asked(demo)[0])
    for _ in range(3):
        loop.step()
    with monkeypatch.context() as patch:
        patch.setattr(Watched, "forward", lambda self, batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.step()
    assert loop.drop_running() == ["0"]
    assert not loop.has_work()
    loop.add(asked(demo, max_tokens=5)[1])
    outputs: list[RequestOutput] = []
    while loop.has_work():
        outputs += loop.step()
    assert [len(output.token_ids) for output in outputs] == [5]
