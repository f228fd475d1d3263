"""Guessing the next tokens of a request so that one step can verify several. Never changes what is generated.

`NGramProposer` is prompt lookup decoding (Saxena 2023): what followed the last occurrence of the current n-gram in the
request's own prompt and output is proposed again. No model is involved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from isologit.engine.request import Sequence
from isologit.errors import ConfigError

_DECAY = 0.85  # weight a verification keeps when the next one arrives
_PRIOR_HITS, _PRIOR_TRIALS = 1.0, 2.0  # a new request's guesses are taken to be right half of the time
_MAX_WAIT = 31  # calls without a guess between two retries, at most


class Proposer(Protocol):
    """What the scheduler needs of a proposer."""

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        """At most `max_tokens` guesses for what follows `seq.token_ids`; empty if there is nothing worth a row."""

    def observe(self, seq: Sequence, proposed: int, accepted: int) -> None:
        """Of `proposed` guesses the first `accepted` were right."""

    def forget(self, seq: Sequence) -> None:
        """The sequence is over."""


@dataclass(slots=True)
class _History:
    """What is known of one request: where its n-grams occurred, and how its guesses fared."""

    follow: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> position after its last occurrence
    num_indexed: int = 0  # n-grams that end up to here are in `follow`
    found: int | None = None  # result of the look-up at `num_indexed`
    hits: float = _PRIOR_HITS
    trials: float = _PRIOR_TRIALS
    misses: int = 0  # verifications in a row without a single right guess
    wait: int = 0  # calls to let pass before the next guess


class NGramProposer:
    """Prompt lookup with a length that adapts to each request and to what a row costs.

    The caller sets `marginal_row_cost`: the time of one more row of the step relative to the time a token is worth now
    (0 = rows are free). If guesses are right independently with probability p, the j-th is useful with probability
    p**j (Leviathan et al. 2023), so a guess is extended while p**j exceeds that cost. p is an exponentially weighted
    share of right guesses. A request whose guesses fail waits longer and longer before the next attempt. Raises
    ConfigError for sizes below 1.
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 2, max_draft: int = 8) -> None:
        if not (1 <= min_ngram <= max_ngram and max_draft >= 1):
            raise ConfigError(
                f"min_ngram ({min_ngram}) must be between 1 and max_ngram ({max_ngram}), and max_draft ({max_draft}) "
                "at least 1"
            )
        self.max_draft = max_draft
        self.marginal_row_cost = 0.0
        self._sizes = range(min_ngram, max_ngram + 1)
        self._histories: dict[str, _History] = {}

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        """At most `max_tokens` guesses; costs time proportional to the tokens gained since the last call."""
        if max_tokens < 1 or self.marginal_row_cost >= 1.0:
            return []
        history = self._histories.get(seq.request.request_id)
        if history is None:
            history = self._histories[seq.request.request_id] = _History()
        if history.wait > 0:
            history.wait -= 1
            return []
        position = self._find(history, seq.token_ids)
        if position is None:
            return []
        length = self._affordable(history)
        if length == 0:
            length, history.wait = 1, _MAX_WAIT
        return _continue_from(seq.token_ids, position, min(length, max_tokens))

    def observe(self, seq: Sequence, proposed: int, accepted: int) -> None:
        """Learn from a verification. A guess after the first wrong one was never tried and does not count."""
        history = self._histories[seq.request.request_id]
        history.hits = history.hits * _DECAY + accepted
        history.trials = history.trials * _DECAY + min(accepted + 1, proposed)
        if accepted > 0:
            history.misses = 0
            return
        history.misses += 1
        history.wait = max(history.wait, min(2 ** (history.misses - 1) - 1, _MAX_WAIT))

    def forget(self, seq: Sequence) -> None:
        """Drop what is known of a finished sequence."""
        self._histories.pop(seq.request.request_id, None)

    def _affordable(self, history: _History) -> int:
        """How many guesses are worth their rows; 0 if not even the first."""
        rate = useful = history.hits / history.trials
        length = 0
        while length < self.max_draft and useful > self.marginal_row_cost:
            length += 1
            useful *= rate
        return length

    def _find(self, history: _History, tokens: list[int]) -> int | None:
        """Position after the most recent earlier occurrence of the longest known n-gram that ends the tokens."""
        follow, length, sizes = history.follow, len(tokens), self._sizes
        if history.num_indexed == length:
            return history.found
        for end in range(history.num_indexed + 1, length):
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
        history.num_indexed, history.found = length, found
        return found


def _continue_from(tokens: list[int], position: int, count: int) -> list[int]:
    """`count` tokens from `position` on; past the end the guess goes on with itself, as a repeating text does."""
    draft = tokens[position : position + count]
    period = len(tokens) - position
    while len(draft) < count:
        draft.append(draft[len(draft) - period])
    return draft
