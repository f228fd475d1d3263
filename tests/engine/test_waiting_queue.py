"""One queue: known requests go as the planner says, late ones by their length and their waiting."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isologit.engine.planner import StepCost, plan
from isologit.engine.request import GenerationRequest, SamplingParams, Sequence, SequenceStatus
from isologit.engine.request_limits import PromptTooLongError, RequestLimits
from isologit.engine.waiting_queue import WaitingQueue
from isologit.errors import RequestError


def waiting(name: str, num_prompt: int, max_tokens: int, arrival_s: float = 0.0) -> Sequence:
    seq = Sequence(GenerationRequest(name, [1] * num_prompt, SamplingParams(max_tokens=max_tokens)))
    seq.arrival_s = arrival_s
    return seq


def drain(queue: WaitingQueue) -> list[str]:
    names = []
    while queue:
        names.append(queue.pop().request.request_id)
    assert queue.head() is None
    return names


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20), st.booleans())
def test_requests_that_are_known_go_in_the_planners_order(lengths: list[tuple[int, int]], longest_first: bool) -> None:
    queue = WaitingQueue(longest_first=longest_first)
    for number, (prompt, max_tokens) in enumerate(lengths):
        queue.push(waiting(str(number), prompt, max_tokens, arrival_s=0.25))
    cost = StepCost((0,), (1.0,), per_row_s=0.1)
    planned = plan(lengths, num_blocks=99, block_size=4, cost=cost, longest_first=longest_first)
    assert drain(queue) == [str(index) for index in planned.order]


def test_nobody_starves() -> None:
    """A short request that waits gains on long ones that come later; one that came with them does not overtake."""
    queue = WaitingQueue()
    queue.push(waiting("short", 1, 10))
    queue.push(waiting("long", 1, 500))
    queue.push(waiting("late", 1, 500, arrival_s=40.0))
    assert drain(queue) == ["long", "short", "late"]


def test_who_leaves_is_not_counted_and_never_comes() -> None:
    queue = WaitingQueue()
    seqs = [waiting(name, 1, length) for name, length in (("a", 9), ("b", 5), ("c", 7))]
    for seq in seqs:
        queue.push(seq)
    queue.left()
    seqs[0].status = SequenceStatus.FINISHED
    assert len(queue) == 2
    assert {seq.request.request_id for seq in queue} == {"b", "c"}
    assert drain(queue) == ["c", "b"]


LIMITS = RequestLimits(max_model_len=16, max_kv_tokens=12, vocab_size=100, has_tokenizer=False)


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], {}, "empty"),
        ([100], {}, r"a prompt token id is outside 0\.\.99"),
        ([1], {"allowed_token_ids": [100]}, "allowed_token_ids is outside"),
        ([1], {"logit_bias": {100: 1.0}}, "logit_bias is outside"),
        ([1], {"stop": "a"}, "stop needs a tokenizer"),
        ([1], {"bad_words": ["a"]}, "bad_words needs a tokenizer"),
        ([1] * 10, {"max_tokens": 7}, "maximum context length is 16"),
        ([1] * 10, {"max_tokens": 4}, "room for 12"),
    ],
)
def test_what_can_never_run_is_refused_in_one_place(ids: list[int], params: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        LIMITS.check(ids, SamplingParams(**{"max_tokens": 1, **params}))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_what_just_fits_is_taken() -> None:
    LIMITS.check([99] * 10, SamplingParams(max_tokens=3, allowed_token_ids=[0, 99], logit_bias={5: 1.0}))
    error = PromptTooLongError(10, 7, 16)
    assert (error.prompt_tokens, error.max_tokens, error.limit) == (10, 7, 16)
