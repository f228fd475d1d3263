"""Prompt lookup: what is found, how long a draft may be, and how a failing request backs off."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isologit.engine.request import GenerationRequest, SamplingParams, Sequence
from isologit.engine.speculation import NGramProposer
from isologit.errors import ConfigError


def sequence(tokens: list[int], request_id: str = "a") -> Sequence:
    return Sequence(GenerationRequest(request_id, tokens, SamplingParams(max_tokens=64)))


def draft(proposer: NGramProposer, seq: Sequence, limit: int) -> list[int]:
    """What is proposed for one sequence alone."""
    return proposer.propose([(seq, limit)], limit)[0]


def look_up(tokens: list[int], count: int, sizes: range) -> list[int]:
    """Prompt lookup by searching the whole text each time."""
    for size in reversed(sizes):
        for end in range(len(tokens) - 1, size - 1, -1):
            if size <= len(tokens) and tokens[end - size : end] == tokens[-size:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    sizes=st.sampled_from([(1, 1), (1, 3), (2, 3), (3, 4)]),
    prompt=st.integers(1, 10),
    asked=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_index_finds_what_a_full_search_finds(
    tokens: list[int], sizes: tuple[int, int], prompt: int, asked: list[bool]
) -> None:
    proposer = NGramProposer(max_ngram=sizes[1], min_ngram=sizes[0], max_draft=5)
    seq = sequence(tokens[:prompt])
    for token, ask in zip([*tokens[prompt:], 0], asked, strict=False):
        if ask:  # gaps between calls must be caught up
            expected = look_up(seq.token_ids, 5, range(sizes[0], sizes[1] + 1))
            assert draft(proposer, seq, 5) == expected
            assert draft(proposer, seq, 2) == expected[:2]
        seq.token_ids.append(token)


def test_longest_and_latest_match_wins_and_a_loop_goes_on() -> None:
    proposer = NGramProposer(max_ngram=3, min_ngram=2, max_draft=8)
    assert draft(proposer, sequence([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]), 1) == [9]
    assert draft(proposer, sequence([2, 3, 9, 2, 3, 8, 2, 3], "b"), 1) == [8]
    assert draft(proposer, sequence([5, 6, 5, 6], "c"), 5) == [5, 6, 5, 6, 5]
    assert draft(proposer, sequence([1, 2, 3, 4], "d"), 5) == []


def test_length_follows_success_and_the_cost_of_a_row() -> None:
    seq = sequence([1, 2] * 8)
    cost = 0.4
    proposer = NGramProposer(lambda rows: cost, max_draft=8)
    assert len(draft(proposer, seq, 8)) == 1  # half a chance: 0.5 > 0.4 > 0.25
    for _ in range(20):
        proposer.observe(seq, 4, 4)
    assert len(draft(proposer, seq, 8)) == 8
    for _ in range(20):
        proposer.observe(seq, 4, 2)  # two in three: 0.667**2 > 0.4 > 0.667**3
    assert len(draft(proposer, seq, 8)) == 2
    assert len(draft(proposer, seq, 1)) == 1
    cost = 0.0
    assert len(draft(proposer, seq, 8)) == 8
    cost = 1.0
    assert draft(proposer, seq, 8) == []


@pytest.mark.parametrize("cost", [0.0, 0.2, 0.9])
def test_a_failing_request_is_retried_rarely_and_recovers(cost: float) -> None:
    seq = sequence([1, 2] * 8)
    proposer = NGramProposer(lambda rows: cost)
    tried = []
    for step in range(400):
        drafts = draft(proposer, seq, 8)
        if drafts:
            tried.append(step)
            proposer.observe(seq, len(drafts), 0)
    assert 10 < len(tried) < 20
    assert max(later - earlier for earlier, later in pairwise(tried)) == 32
    made = 0
    for _ in range(800):
        drafts = draft(proposer, seq, 8)
        made += len(drafts)
        if drafts:
            proposer.observe(seq, len(drafts), len(drafts))
    assert made > 1000
    fresh = NGramProposer()
    assert len(draft(fresh, seq, 8)) == 8


def test_requests_do_not_share_what_is_learned() -> None:
    proposer = NGramProposer()
    bad, good = sequence([1, 2, 1, 2], "bad"), sequence([1, 2, 1, 2], "good")
    for _ in range(5):
        draft(proposer, bad, 4)
        proposer.observe(bad, 4, 0)
    assert draft(proposer, bad, 4) == []
    assert draft(proposer, good, 4) == [1, 2, 1, 2]
    proposer.forget(bad)
    assert draft(proposer, bad, 4) == [1, 2, 1, 2]
    proposer.forget(sequence([1], "never seen"))


def test_sizes_are_checked() -> None:
    for longest, shortest, draft in ((1, 2, 8), (3, 0, 8), (3, 2, 0)):
        with pytest.raises(ConfigError):
            NGramProposer(max_ngram=longest, min_ngram=shortest, max_draft=draft)


def test_drafts_of_all_sequences_share_one_budget_and_its_price_is_of_the_whole_step() -> None:
    asked: list[int] = []

    def cost(rows: int) -> float:
        asked.append(rows)
        return 0.0

    proposer = NGramProposer(cost, max_draft=4)
    wanted = [(sequence([1, 2] * 4, name), limit) for name, limit in (("a", 9), ("b", 0), ("c", 9), ("d", 9))]
    assert [len(drafts) for drafts in proposer.propose(wanted, 6)] == [4, 0, 2, 0]
    assert asked == [4]
