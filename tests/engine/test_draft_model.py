"""The draft model's drafts against what it would generate alone, with a memory that shows every stale key."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.test_scheduler import VOCAB, ask, assert_same_as_alone, make, requests_, run, toy_model

from isologit.backends.batch import FlatBatch, ReadyOutput
from isologit.engine.draft_model import DraftModelProposer
from isologit.engine.request import GenerationRequest, Sequence
from isologit.errors import ConfigError

BLOCK_SIZE = 2


def draft_choice(prefix: tuple[int, ...]) -> int:
    """Mostly what the large model chooses."""
    return (toy_model(prefix) + (sum(prefix) % 7 == 0)) % VOCAB


@dataclass
class ToyDraft:
    """Keeps at each slot the prefix up to the token there, and finds a token's own prefix in its memory only."""

    block_size: int = BLOCK_SIZE
    memory: dict[int, tuple[int, ...]] = field(default_factory=dict)
    fails_after: int = 1 << 30  # rows
    num_rows: int = 0
    most_rows: int = 0

    def forward(self, batch: FlatBatch) -> ReadyOutput:
        prefixes: list[tuple[int, ...]] = []
        for number, (first, count, position) in enumerate(batch.sequences.tolist()):
            table = batch.block_tables[batch.table_rows[number]]
            for row in range(first, first + count):
                before: tuple[int, ...] = ()
                if position:
                    slot = table[(position - 1) // self.block_size] * self.block_size + (position - 1) % self.block_size
                    before = self.memory[int(slot)]
                assert len(before) == position, "read another token's keys"
                prefixes.append((*before, int(batch.token_ids[row])))
                self.memory[int(batch.slots[row])] = prefixes[-1]
                position += 1
        self.num_rows += len(prefixes)
        self.most_rows = max(self.most_rows, len(prefixes))
        chosen = [draft_choice(prefixes[row]) for row in batch.logits_rows]
        if self.num_rows > self.fails_after:
            chosen = [-1] * len(chosen)
        assert not batch.logits_wanted.any()
        final = np.zeros((len(chosen), 1), np.float32)
        return ReadyOutput(np.array(chosen, np.int64), final, np.zeros((0, VOCAB), np.float32))

    def project(self, final: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Checked(DraftModelProposer):
    """Compares every draft with what the draft model generates from the whole text."""

    num_checked = 0

    def propose(self, wanted: list[tuple[Sequence, int]], budget: int) -> list[list[int]]:
        found = super().propose(wanted, budget)
        assert sum(map(len, found)) <= max(budget, 0)
        for (seq, limit), draft in zip(wanted, found, strict=True):
            assert len(draft) <= max(limit, 0)
            text = list(seq.token_ids)
            for token in draft:
                assert token == draft_choice(tuple(text))
                text.append(token)
            self.num_checked += len(draft)
        return found


def proposer(model: ToyDraft, *, max_rows: int = 64, max_draft: int = 4, cost: float = 0.0) -> Checked:
    return Checked(model, lambda rows: cost, max_rows=max_rows, max_draft=max_draft)


@settings(max_examples=100, deadline=None)
@given(requests=requests_(), slots=st.integers(1, 5), max_rows=st.integers(1, 12), max_draft=st.integers(1, 6))
def test_drafts_are_the_drafts_own_text_and_change_nothing(
    requests: list[GenerationRequest], slots: int, max_rows: int, max_draft: int
) -> None:
    model = ToyDraft()
    drafting = proposer(model, max_rows=max(max_rows, slots), max_draft=max_draft)
    outcome = run(make(slots=slots, budget=slots + 9, block_size=BLOCK_SIZE, proposer=drafting), requests)
    assert_same_as_alone(outcome, requests)
    assert model.most_rows <= max(max_rows, slots)
    assert drafting.num_checked == outcome.num_draft_tokens
    assert not drafting._num_computed
    assert not drafting._runner._tables


LONG = [ask(name, [1, 2, 3, 4], 24, ignore_eos=True) for name in "abc"]


def test_a_good_draft_saves_steps() -> None:
    plain, drafted = run(make(), LONG), run(make(budget=32, proposer=proposer(ToyDraft())), LONG)
    assert drafted.num_steps < plain.num_steps


def test_keys_of_wrong_drafts_are_computed_again_or_it_is_noticed() -> None:
    """The inverse: a proposer that takes one rejected draft for computed."""

    class Forgetful(Checked):
        def observe(self, seq: Sequence, proposed: int, accepted: int) -> None:
            super().observe(seq, proposed, accepted)
            self._num_computed[seq.request.request_id] += int(accepted < proposed - 1)

    with pytest.raises(AssertionError):
        run(make(budget=32, proposer=Forgetful(ToyDraft(), lambda rows: 0.0, max_rows=64, max_draft=4)), LONG)


def test_drafts_that_do_not_pay_are_not_made() -> None:
    model = ToyDraft()
    assert run(make(proposer=proposer(model, cost=1.0)), LONG).num_draft_tokens == 0
    assert model.num_rows == 0


def test_a_draft_model_that_breaks_stops_drafting_and_nothing_else() -> None:
    outcome = run(make(budget=32, proposer=proposer(ToyDraft(fails_after=30))), LONG)
    assert_same_as_alone(outcome, LONG)
    assert outcome.num_draft_tokens > 0


def test_its_length_is_checked() -> None:
    with pytest.raises(ConfigError):
        proposer(ToyDraft(), max_draft=0)
