"""Drafting the next tokens of requests so that one step can verify several. Never changes what is generated.

Owns what every proposer shares, above all how long a draft may be, and `NGramProposer`, which needs no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from isologit.engine.request import Sequence
from isologit.errors import ConfigError

_DECAY = 0.85  # weight a verification keeps when the next one arrives
_PRIOR_HITS, _PRIOR_TRIALS = 1.0, 2.0  # a new request's draft tokens are taken to be right half of the time
_MAX_WAIT = 31  # calls without a draft between two retries, at most

# Time of one more draft token in a step of so many rows, relative to what a token costs now: 0 is free, 1 a token's.
RowCost = Callable[[int], float]


class Proposer(Protocol):
    """What the scheduler needs of a proposer."""

    def is_worthwhile(self, num_sequences: int) -> bool:
        """Whether a draft could be worth its rows in a step of so many sequences; if not, `propose` has none."""

    def propose(self, wanted: list[tuple[Sequence, int]], budget: int) -> list[list[int]]:
        """Drafts for what follows each sequence that has a row in the next step, empty where none is worth a row.

        wanted: (sequence, most draft tokens it can use, perhaps 0). Those of all are at most `budget` in all.
        """

    def observe(self, seq: Sequence, proposed: int, accepted: int) -> None:
        """Of `proposed` draft tokens the first `accepted` were right."""

    def forget(self, seq: Sequence) -> None:
        """The sequence is over."""


@dataclass(slots=True)
class _Record:
    """How the drafts for one request fared."""

    hits: float = _PRIOR_HITS
    trials: float = _PRIOR_TRIALS
    misses: int = 0  # verifications in a row without a single accepted token
    wait: int = 0  # calls to let pass before the next draft


class DraftLengths:
    """How many draft tokens each request is worth, from how earlier ones fared and from what one more costs now.

    If draft tokens are accepted independently with probability p, the j-th is useful with probability p**j (Leviathan
    et al. 2023), so a draft is extended while p**j exceeds its cost. p is an exponentially weighted share of accepted
    tokens. A request whose drafts fail waits longer and longer before the next attempt.
    """

    def __init__(self, max_draft: int) -> None:
        if max_draft < 1:
            raise ConfigError(f"max_draft must be at least 1, not {max_draft}")
        self.max_draft = max_draft
        self._records: dict[str, _Record] = {}

    def is_due(self, seq: Sequence) -> bool:
        """Whether the request may be drafted for in this step; a request that waits has waited one step more."""
        record = self._records.get(seq.request.request_id)
        if record is None or record.wait == 0:
            return True
        record.wait -= 1
        return False

    def choose(self, seq: Sequence, cost: float) -> int:
        """How many draft tokens to propose: at least one, as a probe; after a vain one the request waits."""
        record = self._records.setdefault(seq.request.request_id, _Record())
        rate = useful = record.hits / record.trials
        length = 0
        while length < self.max_draft and useful > cost:
            length += 1
            useful *= rate
        if length == 0:
            length, record.wait = 1, _MAX_WAIT
        return length

    def observe(self, seq: Sequence, proposed: int, accepted: int) -> None:
        """Learn from a verification. A token after the first rejected one was never tried and does not count."""
        record = self._records[seq.request.request_id]
        record.hits = record.hits * _DECAY + accepted
        record.trials = record.trials * _DECAY + min(accepted + 1, proposed)
        if accepted > 0:
            record.misses = 0
            return
        record.misses += 1
        record.wait = max(record.wait, min(2 ** (record.misses - 1) - 1, _MAX_WAIT))

    def forget(self, seq: Sequence) -> None:
        """Drop what is known of a finished sequence."""
        self._records.pop(seq.request.request_id, None)


@dataclass(slots=True)
class _Index:
    """Where the n-grams of one request occurred."""

    follow: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> position after its last occurrence
    num_indexed: int = 0  # n-grams that end up to here are in `follow`
    found: int | None = None  # result of the look-up at `num_indexed`


class NGramProposer:
    """Prompt lookup decoding (Saxena 2023): what followed the last occurrence of the current n-gram comes again.

    Looks through the request's own prompt and output. Raises ConfigError for sizes below 1.
    """

    def __init__(
        self, row_cost: RowCost = lambda rows: 0.0, *, max_ngram: int = 3, min_ngram: int = 2, max_draft: int = 8
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ConfigError(f"min_ngram ({min_ngram}) must be between 1 and max_ngram ({max_ngram})")
        self._row_cost = row_cost
        self._sizes = range(min_ngram, max_ngram + 1)
        self._lengths = DraftLengths(max_draft)
        self._indices: dict[str, _Index] = {}

    def is_worthwhile(self, num_sequences: int) -> bool:
        """Whether one more row costs less than a token does now."""
        return self._row_cost(num_sequences) < 1.0

    def propose(self, wanted: list[tuple[Sequence, int]], budget: int) -> list[list[int]]:
        """Drafts by prompt lookup; the time it takes is proportional to the tokens gained since the last call."""
        drafts: list[list[int]] = [[] for _ in wanted]
        cost = self._row_cost(len(wanted))
        if cost >= 1.0:
            return drafts
        for i, (seq, limit) in enumerate(wanted):
            limit = min(limit, budget)
            if limit < 1 or not self._lengths.is_due(seq):
                continue
            position = self._find(seq)
            if position is not None:
                length = min(limit, self._lengths.choose(seq, cost))
                drafts[i] = _continue_from(seq.token_ids, position, length)
                budget -= length
        return drafts

    def observe(self, seq: Sequence, proposed: int, accepted: int) -> None:
        """Learn from a verification."""
        self._lengths.observe(seq, proposed, accepted)

    def forget(self, seq: Sequence) -> None:
        """Drop what is known of a finished sequence."""
        self._lengths.forget(seq)
        self._indices.pop(seq.request.request_id, None)

    def _find(self, seq: Sequence) -> int | None:
        """Position after the most recent earlier occurrence of the longest known n-gram that ends the tokens."""
        index = self._indices.get(seq.request.request_id)
        if index is None:
            index = self._indices[seq.request.request_id] = _Index()
        tokens = seq.token_ids
        follow, length, sizes = index.follow, len(tokens), self._sizes
        if index.num_indexed == length:
            return index.found
        for end in range(index.num_indexed + 1, length):
            for size in sizes:
                if size <= end:
                    follow[tuple(tokens[end - size : end])] = end
        found: int | None = None
        for size in sizes:
            if size <= length:
                ngram = tuple(tokens[length - size :])
                # NOTE: looked up before it is entered, so only earlier occurrences are found; longer ones win.
                found = follow.get(ngram, found)
                follow[ngram] = length
        index.num_indexed, index.found = length, found
        return found


def _continue_from(tokens: list[int], position: int, count: int) -> list[int]:
    """`count` tokens from `position` on; past the end the draft goes on with itself, as a repeating text does."""
    draft = tokens[position : position + count]
    period = len(tokens) - position
    while len(draft) < count:
        draft.append(draft[len(draft) - period])
    return draft
