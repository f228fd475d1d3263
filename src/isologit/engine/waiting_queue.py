"""The one queue of requests that wait for a slot, known beforehand or arriving as they please."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from isologit.engine.request import Sequence, SequenceStatus

_AGING_TOKENS_PER_S = 16.0  # a second of waiting is worth so many tokens of output, so that nobody starves


class WaitingQueue:
    """Longest output first, then longest prompt, then first come: what takes most steps must not start last.

    That is the greedy rule of Graham (1969). Requests that arrive together are in the order that `planner.plan` gives
    them; those that arrive later gain on newer ones by waiting. longest_first: False serves them as they came.
    """

    def __init__(self, *, longest_first: bool = True) -> None:
        self._longest_first = longest_first
        self._heap: list[tuple[float, int, int, Sequence]] = []
        self._numbers = itertools.count()
        self._num_left = 0  # entries of sequences that left while they waited

    def __len__(self) -> int:
        return len(self._heap) - self._num_left

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return (entry[-1] for entry in self._heap if entry[-1].status is SequenceStatus.WAITING)

    def push(self, seq: Sequence) -> None:
        """Put a sequence where its length and arrival say."""
        urgency, prompt = 0.0, 0
        if self._longest_first:
            prompt = seq.num_prompt_tokens
            urgency = seq.max_total_tokens - prompt - _AGING_TOKENS_PER_S * seq.arrival_s
        heapq.heappush(self._heap, (-urgency, -prompt, next(self._numbers), seq))

    def head(self) -> Sequence | None:
        """The next one, which stays; None if nobody waits."""
        while self._heap and self._heap[0][-1].status is not SequenceStatus.WAITING:
            heapq.heappop(self._heap)
            self._num_left -= 1
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> Sequence:
        """Take the next one out, before its status changes."""
        seq = self.head()
        assert seq is not None
        heapq.heappop(self._heap)
        return seq

    def left(self) -> None:
        """A sequence that waits is about to end: it counts no longer."""
        self._num_left += 1
