"""How far a run in progress is, from the engine's step records."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from isologit.common.progress import Observer, Progress
from isologit.engine.step_record import StepRecord

_TICK_S = 0.5


class StepSource(Protocol):
    """Where the steps of a run in progress can be looked at."""

    step_records: list[StepRecord]


class InferenceMeter:
    """Counts the tokens of a run in progress from the engine's step records, a few times a second."""

    def __init__(self, source: StepSource, observer: Observer, max_tokens: Sequence[int]) -> None:
        self._source = source
        self._observer = observer
        self._total = len(max_tokens)
        self._expected = max(1, sum(max_tokens))
        self._done = 0
        self._spared = 0  # tokens that will never be made, since their requests ended early
        self._seen = 0  # step records counted
        self._tokens = 0

    def finished(self, num_tokens: int, max_tokens: int) -> None:
        """One more request is complete."""
        self._done += 1
        self._spared += max_tokens - num_tokens

    @contextmanager
    def running(self) -> Iterator[None]:
        """Reports until the block ends, and once more then."""
        stop = threading.Event()

        def tick() -> None:
            while not stop.wait(_TICK_S):
                self._report()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._report()

    def _report(self) -> None:
        records = self._source.step_records
        count = len(records)
        for record in records[self._seen : count]:
            self._tokens += record.num_logits - record.num_draft_tokens + record.num_accepted_tokens
        self._seen = count
        fraction = min(1.0, (self._tokens + self._spared) / self._expected)
        self._observer.progress(Progress(self._done, self._total, fraction, self._tokens))
