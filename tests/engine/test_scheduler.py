"""The scheduler against a toy model whose key/value memory is a dictionary, and broken parts that must be caught.

The toy writes, for each fed token, the whole prefix into (block, offset); each row then reads its prefix back from
memory, as attention would. Sharing the wrong block, feeding a token twice or accepting a wrong draft shows up at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isologit.engine.blocks import BlockPool
from isologit.engine.pipeline import Pipeline
from isologit.engine.request import GenerationRequest, SamplingParams, Sequence, SequenceStatus
from isologit.engine.scheduler import ScheduledSequence, Scheduler, SchedulerConfig, StepPlan
from isologit.engine.speculation import NGramProposer, Proposer
from isologit.errors import ConfigError, RequestError

VOCAB = 5
EOS = (0,)
MASKED = VOCAB  # what the toy chooses where the end of the sequence is forbidden


def toy_model(prefix: tuple[int, ...]) -> int:
    """Next token of a prefix; repeats itself often enough for drafts to be right, and depends on the whole prefix."""
    recent = prefix[-1] * 3 + (prefix[-2] if len(prefix) > 1 else 0)
    return (recent + prefix[0] + len(prefix) // 9 + sum(prefix[: len(prefix) // 2])) % VOCAB


def toy_choice(token: int, params: SamplingParams, num_output_tokens: int) -> int:
    """What a sampler makes of the argmax `token` of the first row."""
    if num_output_tokens < params.min_tokens and token in (*EOS, *params.stop_token_ids):
        token = MASKED
    return token if params.greedy else (token + 1) % VOCAB


def one_at_a_time(request: GenerationRequest) -> tuple[list[int], str]:
    """Output and finish reason of a request that runs alone."""
    params, output = request.params, []
    if request.replay_token_ids is not None:
        output = request.replay_token_ids[: params.max_tokens]
        complete = len(output) == len(request.replay_token_ids)
        return output, "stop" if output and complete and output[-1] in EOS else "length"
    while len(output) < params.max_tokens:
        token = toy_choice(toy_model((*request.prompt_token_ids, *output)), params, len(output))
        ends = token in params.stop_token_ids or (token in EOS and not params.ignore_eos)
        allowed = len(output) >= params.min_tokens
        output.append(token)
        if ends and allowed:
            return output, "stop"
    return output, "length"


class ToyResult(NamedTuple):
    first_rows: list[int]
    chosen: list[list[int]]


class ToyDevice(NamedTuple):
    overlaps_steps: bool


@dataclass
class ToyRunner:
    """Executes plans on a dictionary memory: (block, offset) -> prefix up to and with the token there."""

    block_size: int
    memory: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    backend: ToyDevice | None = None
    last: list[int] = field(default_factory=list)  # argmax of the last step's rows

    def execute(self, plan: StepPlan) -> ToyResult:
        fed: list[tuple[ScheduledSequence, list[int]]] = []
        written: set[tuple[int, int]] = set()
        for entry in plan.sequences:
            seq, start = entry.seq, entry.start
            known = seq.token_ids[: start + entry.num_tokens - len(entry.draft_token_ids)] + entry.draft_token_ids
            assert all(token >= 0 for token in known[:-1])
            known[-1] = known[-1] if known[-1] >= 0 else self.last[-1 - known[-1]]
            assert len(known) == start + entry.num_tokens > start
            fed.append((entry, known))
            for position in range(start, len(known)):
                slot = (seq.block_ids[position // self.block_size], position % self.block_size)
                assert slot not in written, "two rows of one step write to the same place"
                written.add(slot)
                self.memory[slot] = tuple(known[: position + 1])
        chosen: list[list[int]] = []
        first_rows: list[int] = []
        self.last = []
        for entry, known in fed:
            seq = entry.seq
            for position in range(len(known)):
                slot = (seq.block_ids[position // self.block_size], position % self.block_size)
                assert self.memory.get(slot) == tuple(known[: position + 1]), "read another sequence's prefix"
            rows = range(len(known) - entry.num_logits, len(known))
            tokens = [toy_model(tuple(known[: row + 1])) for row in rows]
            first_rows.append(len(self.last))
            self.last += tokens
            if tokens:
                tokens[0] = toy_choice(tokens[0], seq.request.params, seq.num_output_tokens)
            chosen.append(tokens)
        return ToyResult(first_rows, chosen)


class NoisyProposer:
    """Guesses with the toy model itself, and wrongly every now and then."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.known: set[str] = set()

    def is_worthwhile(self, num_sequences: int) -> bool:
        return True

    def propose(self, wanted: list[tuple[Sequence, int]], budget: int) -> list[list[int]]:
        drafts = []
        for seq, limit in wanted:
            drafts.append(self.guess(seq, min(limit, budget)) if min(limit, budget) > 0 else [])
            budget -= len(drafts[-1])
        return drafts

    def guess(self, seq: Sequence, max_tokens: int) -> list[int]:
        self.known.add(seq.request.request_id)
        tokens, wanted = list(seq.token_ids), self.random.randint(0, min(max_tokens, 5))
        for _ in range(wanted):
            right = self.random.random() < 0.8
            tokens.append(toy_model(tuple(tokens)) if right else self.random.randrange(VOCAB))
        return tokens[len(seq.token_ids) :]

    def observe(self, seq: Sequence, proposed: int, accepted: int) -> None:
        assert 0 <= accepted <= proposed > 0

    def forget(self, seq: Sequence) -> None:
        self.known.discard(seq.request.request_id)


class Oracle(NoisyProposer):
    """Always right, and as long as it may be."""

    def guess(self, seq: Sequence, max_tokens: int) -> list[int]:
        tokens = list(seq.token_ids)
        for _ in range(max_tokens):
            tokens.append(toy_model(tuple(tokens)))
        return tokens[len(seq.token_ids) :]


@dataclass
class Outcome:
    outputs: dict[str, Sequence]
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_cached_tokens: int = 0
    num_ahead: int = 0  # steps that ran while the one before them was not committed
    num_passed_over: int = 0  # rows of sequences that had ended


def run(
    scheduler: Scheduler,
    requests: list[GenerationRequest],
    aborts: dict[int, str] | None = None,
    late: int = 0,
    *,
    overlaps: bool = False,
    runner_class: type[ToyRunner] = ToyRunner,
) -> Outcome:
    """Drive a scheduler to the end. `aborts` maps a step to the request cancelled before it; `late` requests are added
    one per step; `overlaps`: each step is executed before the one ahead of it is committed, where that is foreseen."""
    runner: Any = runner_class(scheduler.blocks.block_size, backend=ToyDevice(overlaps))
    pipeline = Pipeline(scheduler, runner)
    outcome = Outcome({})
    queue = [Sequence(request) for request in requests]
    for seq in queue[: len(queue) - late]:
        scheduler.add(seq)
    queue = queue[len(queue) - late :]
    aborts = dict(aborts or {})

    def report(seqs: list[Sequence]) -> None:
        for seq in seqs:
            assert seq.request.request_id not in outcome.outputs, "reported twice"
            assert seq.status is SequenceStatus.FINISHED
            assert not seq.block_ids
            outcome.outputs[seq.request.request_id] = seq
            outcome.num_cached_tokens += seq.num_cached_tokens

    while scheduler.has_work() or pipeline or queue:
        if queue:
            scheduler.add(queue.pop(0))
        victim = aborts.pop(outcome.num_steps, None)
        if victim is not None and (seq := scheduler.abort(victim)) is not None:
            assert seq.finish_reason == "abort"
            report([seq])
        outcome.num_steps += 1
        step = pipeline.next()
        if not pipeline:  # else a slot may have been given away by a sequence whose end is foreseen
            scheduler.check_integrity()
        if step is None:
            report(scheduler.take_finished())
            continue
        plan, result = step.plan, step.result
        outcome.num_ahead += bool(pipeline)
        assert plan.num_tokens == sum(entry.num_tokens for entry in plan.sequences)
        assert 0 < plan.num_tokens <= scheduler.config.max_num_batched_tokens
        assert len({id(entry.seq) for entry in plan.sequences}) == len(plan.sequences) <= scheduler.config.max_num_seqs
        running = [entry for entry in plan.sequences if entry.seq.status is SequenceStatus.RUNNING]
        assert overlaps or running == plan.sequences
        outcome.num_passed_over += len(plan.sequences) - len(running)
        before = {id(entry): len(entry.seq.token_ids) for entry in plan.sequences}
        outcome.num_draft_tokens += sum(len(entry.draft_token_ids) for entry in plan.sequences)
        finished = scheduler.commit(plan, result.chosen)
        for entry in plan.sequences:
            assert entry.num_accepted == len(entry.seq.token_ids) - before[id(entry)]
            assert (entry.num_accepted > 0) == (entry.num_logits > 0 and entry in running)
        report(finished)
        scheduler.check_integrity()
        assert outcome.num_steps < 5000
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks, "blocks leaked"
    assert set(outcome.outputs) == {request.request_id for request in requests}
    return outcome


def assert_same_as_alone(outcome: Outcome, requests: list[GenerationRequest]) -> None:
    for request in requests:
        seq = outcome.outputs[request.request_id]
        output, reason = one_at_a_time(request)
        if seq.finish_reason == "abort":
            assert seq.output_token_ids == output[: seq.num_output_tokens]
        else:
            assert seq.output_token_ids == output
            assert seq.finish_reason == reason


def make(
    *, slots: int = 4, budget: int = 16, blocks: int = 64, block_size: int = 2, caching: bool = True,
    proposer: Proposer | None = None, pool: type[BlockPool] = BlockPool, scheduler: type[Scheduler] = Scheduler,
) -> Scheduler:  # fmt: skip
    config = SchedulerConfig(slots, budget, EOS, 64)
    return scheduler(config, pool(blocks, block_size, enable_prefix_caching=caching), proposer)


def ask(request_id: str, prompt: list[int], max_tokens: int = 8, **params: object) -> GenerationRequest:
    return GenerationRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens, **params))  # type: ignore[arg-type]


TOKENS = st.integers(0, VOCAB - 1)


@st.composite
def requests_(draw: st.DrawFn) -> list[GenerationRequest]:
    shared = draw(st.lists(TOKENS, max_size=10))
    listed = []
    for i in range(draw(st.integers(1, 9))):
        prompt = shared[: draw(st.integers(0, len(shared)))] + draw(st.lists(TOKENS, min_size=1, max_size=8))
        max_tokens = draw(st.integers(1, 14))
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=draw(st.sampled_from([0.0, 0.0, 0.0, 1.0])),
            stop_token_ids=draw(st.lists(TOKENS, max_size=1)),
            ignore_eos=draw(st.booleans()),
            min_tokens=draw(st.sampled_from([0, 0, max_tokens // 2, max_tokens])),
        )
        replay = draw(st.one_of(st.none(), st.none(), st.lists(TOKENS, max_size=16)))
        listed.append(GenerationRequest(str(i), prompt, params, replay_token_ids=replay))
    return listed


@settings(max_examples=150, deadline=None)
@given(data=st.data(), requests=requests_())
def test_any_schedule_gives_what_a_request_gets_alone(data: st.DataObject, requests: list[GenerationRequest]) -> None:
    slots = data.draw(st.integers(1, 6))
    block_size = data.draw(st.integers(1, 5))
    largest = max(-(-(Sequence(r).max_total_tokens - 1) // block_size) for r in requests)
    proposer = data.draw(st.sampled_from([None, NoisyProposer(len(requests)), NGramProposer(max_draft=4)]))
    scheduler = make(
        slots=slots,
        budget=slots + data.draw(st.integers(0, 12)),
        blocks=max(1, largest) + data.draw(st.integers(0, 20)),
        block_size=block_size,
        caching=data.draw(st.booleans()),
        proposer=proposer,
    )
    ids = st.sampled_from([request.request_id for request in requests])
    aborts = data.draw(st.dictionaries(st.integers(0, 30), ids, max_size=3))
    late, overlaps = data.draw(st.integers(0, len(requests))), data.draw(st.booleans())
    outcome = run(scheduler, requests, aborts, late, overlaps=overlaps)
    assert_same_as_alone(outcome, requests)
    if isinstance(proposer, NoisyProposer):
        assert not proposer.known


# -- single rules ---------------------------------------------------------------------------------------------------


def test_prompt_is_fed_in_chunks_beside_decode_rows() -> None:
    scheduler = make(slots=2, budget=4)
    scheduler.add(Sequence(ask("a", [1, 2], ignore_eos=True)))
    scheduler.add(Sequence(ask("b", [1, 2, 3, 4, 1, 2], ignore_eos=True)))
    runner, seen = ToyRunner(2), []
    for _ in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        seen.append([(e.seq.request.request_id, e.start, e.num_tokens, e.num_logits) for e in plan.sequences])
        scheduler.commit(plan, runner.execute(plan).chosen)
    assert seen == [
        [("a", 0, 2, 1), ("b", 0, 2, 0)],
        [("a", 2, 1, 1), ("b", 2, 3, 0)],
        [("a", 3, 1, 1), ("b", 5, 1, 1)],
    ]


def test_admission_waits_for_blocks_and_keeps_the_order_of_the_queue() -> None:
    scheduler = make(slots=3, blocks=6, block_size=2)
    for name, prompt in (("a", [1] * 5), ("b", [2] * 5), ("c", [3])):
        scheduler.add(Sequence(ask(name, prompt, 4, ignore_eos=True)))  # 4, 4 and 2 blocks
    plan = scheduler.schedule()
    assert plan is not None
    assert [entry.seq.request.request_id for entry in plan.sequences] == ["a"]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)


def test_the_last_token_needs_no_room() -> None:
    request = ask("a", [1, 2, 3], 6, ignore_eos=True)  # 8 tokens fed, 9 in all
    assert_same_as_alone(run(make(blocks=4, block_size=2), [request]), [request])
    with pytest.raises(RequestError, match="key/value"):
        make(blocks=3, block_size=2).add(Sequence(request))


def test_prefix_is_reused_and_the_last_prompt_token_computed() -> None:
    requests = [ask("a", [1, 2, 3, 4], 2), ask("b", [1, 2, 3, 4], 2), ask("c", [1, 2, 3, 4, 1], 2)]
    outcome = run(make(slots=1), requests)
    assert [outcome.outputs[name].num_cached_tokens for name in "abc"] == [0, 2, 4]
    assert run(make(slots=1, caching=False), requests).num_cached_tokens == 0


def test_right_drafts_save_steps_and_change_nothing() -> None:
    requests = [ask("a", [1, 2], 12, ignore_eos=True)]
    plain, drafted = run(make(), requests), run(make(proposer=Oracle(0)), requests)
    assert (plain.num_steps, drafted.num_steps) == (12, 2)
    assert plain.outputs["a"].token_ids == drafted.outputs["a"].token_ids
    tight = run(make(slots=1, budget=3, proposer=Oracle(0)), requests)
    assert tight.num_steps == 1 + 4  # two drafts and the row itself fit a step
    for params in ({"temperature": 1.0}, {"repetition_penalty": 1.1}, {"min_tokens": 12}):
        request = ask("a", [1, 2], 12, ignore_eos=True, **params)
        assert run(make(proposer=Oracle(0)), [request]).num_draft_tokens == 0


def test_drafts_do_not_bring_prefill_to_a_halt() -> None:
    scheduler, runner = make(slots=2, budget=4, proposer=Oracle(0)), ToyRunner(2)
    scheduler.add(Sequence(ask("a", [1, 2], 40, ignore_eos=True)))
    scheduler.add(Sequence(ask("b", [3] * 9, 4, ignore_eos=True)))
    for _ in range(4):
        plan = scheduler.schedule()
        assert plan is not None
        assert [entry.seq.request.request_id for entry in plan.sequences] == ["a", "b"]
        assert plan.num_tokens == 4
        scheduler.commit(plan, runner.execute(plan).chosen)


def test_shared_blocks_let_a_request_in_that_would_not_fit_alone() -> None:
    requests = [ask(name, [1, 2, 3, 4, 1], 4, ignore_eos=True) for name in "ab"]  # 4 blocks each, 2 of them shared
    assert run(make(blocks=6), requests).num_steps == 5
    assert run(make(blocks=6, caching=False), requests).num_steps == 8


def test_tokens_after_the_end_are_cut_and_the_reason_is_kept() -> None:
    class Fixed(NoisyProposer):
        def guess(self, seq: Sequence, max_tokens: int) -> list[int]:
            return [3, 0, 2][:max_tokens]

    for stop, reason in (([], None), ([3], 3)):
        scheduler = make(proposer=Fixed(0))
        scheduler.add(Sequence(ask("a", [1], 9, stop_token_ids=stop)))
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, [[4]])
        plan = scheduler.schedule()
        assert plan is not None
        (seq,) = scheduler.commit(plan, [[3, 0, 2, 1]])
        assert seq.output_token_ids == ([4, 3] if stop else [4, 3, 0])
        assert plan.sequences[0].num_accepted == seq.num_output_tokens - 1
        assert (seq.finish_reason, seq.stop_reason) == ("stop", reason)


@pytest.mark.parametrize(
    ("replay", "max_tokens", "output", "reason"),
    [
        ([], 4, [], "length"),
        ([0, 1, 2], 8, [0, 1, 2], "length"),
        ([1, 0], 8, [1, 0], "stop"),
        ([1, 0, 2], 2, [1, 0], "length"),
    ],
)
def test_replay_gives_the_record(replay: list[int], max_tokens: int, output: list[int], reason: str) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    request = GenerationRequest("a", [1, 2], params, replay_token_ids=replay)
    for others in ([], [ask("b", [3], 3)]):
        seq = run(make(), [request, *others]).outputs["a"]
        assert (seq.output_token_ids, seq.finish_reason) == (output, reason)


def test_finish_and_abort_free_the_slot_at_once() -> None:
    scheduler = make(slots=2)
    sequences = [Sequence(ask(name, [1, 2, 3])) for name in "abc"]
    for seq in sequences:
        scheduler.add(seq)
    plan = scheduler.schedule()
    assert plan is not None
    assert scheduler.abort("b") is sequences[1]
    assert scheduler.commit(plan, [[1], [1]]) == []
    assert (plan.sequences[1].num_accepted, sequences[1].num_output_tokens) == (0, 0)
    scheduler.finish(sequences[0], "stop", "text")
    assert scheduler.abort("c") is sequences[2]
    assert scheduler.abort("c") is None
    assert not scheduler.has_work()
    assert scheduler.schedule() is None
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert (sequences[0].finish_reason, sequences[0].stop_reason) == ("stop", "text")


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        SchedulerConfig(8, 7, EOS, 64)
    with pytest.raises(ConfigError, match="max_num_seqs"):
        SchedulerConfig(0, 7, EOS, 64)
    scheduler = make()
    scheduler.add(Sequence(ask("a", [1])))
    for request in (ask("a", [1]), ask("b", []), ask("c", [1] * 60, 5)):
        with pytest.raises(RequestError):
            scheduler.add(Sequence(request))


# -- inverse: broken parts must be caught ---------------------------------------------------------------------------

SHARED = [ask(str(i), [1, 2, 3, 4, 1, i % VOCAB], 9, ignore_eos=True) for i in range(8)]
SHIFTED = [ask("a", [1, 2, 3, 4, 1], 6, ignore_eos=True), ask("b", [3, 4, 1, 2, 1], 6, ignore_eos=True)]


class ForgetsParent(BlockPool):
    def register(self, block_id: int, parent: int | None, tokens: list[int]) -> None:  # type: ignore[override]
        super().register(block_id, None, tokens)


class ReleasesTwice(BlockPool):
    def release(self, block_ids: list[int]) -> None:  # type: ignore[override]
        super().release(block_ids)
        super().release(block_ids[:1])


class KeepsOne(BlockPool):
    def release(self, block_ids: list[int]) -> None:  # type: ignore[override]
        super().release(block_ids[1:])


class SharesWithoutCounting(BlockPool):
    def acquire(self, block_ids: list[int]) -> None:  # type: ignore[override]
        super().acquire([i for i in block_ids if self._ref_counts[i] == 0])


class MatchesWholePrompt(BlockPool):
    def match_prefix(self, token_ids: list[int]) -> list[int]:  # type: ignore[override]
        return super().match_prefix([*token_ids, 0])


class AcceptsEveryDraft(Scheduler):
    def _verify(self, entry: ScheduledSequence, tokens: list[int]) -> list[int]:
        return [*entry.draft_token_ids, tokens[-1]]


class RegistersTooEarly(Scheduler):
    def _admit(self, seq: Sequence) -> bool:
        admitted = super()._admit(seq)
        if admitted:
            computed, seq.num_computed_tokens = seq.num_computed_tokens, len(seq.token_ids)
            self._register_full_blocks(seq)
            seq.num_computed_tokens = computed
        return admitted


@pytest.mark.parametrize("pool", [ReleasesTwice, KeepsOne, SharesWithoutCounting])
def test_broken_accounting_is_caught(pool: type[BlockPool]) -> None:
    run(make(slots=2), SHARED)
    with pytest.raises(AssertionError):
        run(make(slots=2, pool=pool), SHARED)


def test_a_block_shared_under_the_wrong_prefix_is_caught() -> None:
    run(make(slots=1), SHIFTED)
    with pytest.raises(AssertionError, match="another sequence's prefix"):
        run(make(slots=1, pool=ForgetsParent), SHIFTED)


def test_a_prompt_with_nothing_left_to_compute_is_caught() -> None:
    twice = [ask("a", [1, 2, 3, 4]), ask("b", [1, 2, 3, 4])]
    run(make(slots=1), twice)
    with pytest.raises(AssertionError):
        run(make(slots=1, pool=MatchesWholePrompt), twice)


def test_a_block_registered_before_it_is_computed_is_caught() -> None:
    aborts = {1: "0"}  # when three of its six prompt tokens are computed
    run(make(slots=2, budget=3), SHARED, aborts)
    with pytest.raises(AssertionError, match="another sequence's prefix"):
        run(make(slots=2, budget=3, scheduler=RegistersTooEarly), SHARED, aborts)


def test_a_draft_accepted_unseen_is_caught() -> None:
    assert_same_as_alone(run(make(proposer=NoisyProposer(1)), SHARED), SHARED)
    with pytest.raises(AssertionError):
        assert_same_as_alone(run(make(proposer=NoisyProposer(1), scheduler=AcceptsEveryDraft), SHARED), SHARED)
