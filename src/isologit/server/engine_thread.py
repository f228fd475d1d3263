"""The engine on a thread of its own, and its requests as asynchronous streams.

Owns the hand-over between the two worlds: what arrives is applied between steps, and what a step gained goes back in
one call, however many requests gained something. It does not know HTTP, and turns no token into text.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from isologit.engine.loop import EngineLoop
from isologit.engine.request import GenerationRequest, RequestOutput
from isologit.errors import IsologitError, RequestError

_MOST_FAILURES_IN_A_ROW = 3
_IDLE_S = 0.5
_AGING_TOKENS_PER_S = 16.0  # longer requests go first, but a second of waiting is worth so many tokens

logger = logging.getLogger(__name__)


class QueueFullError(IsologitError):
    """More requests are waiting than the server holds."""


class EngineFailedError(IsologitError):
    """The step a request took part in failed, or the engine cannot go on."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What a request gained in one step; `output` is its whole result, when it is over."""

    token_ids: Sequence[int]
    logprobs: Sequence[dict[int, float]] = ()
    output: RequestOutput | None = None
    error: str | None = None


class AsyncEngine:
    """Requests from an event loop to the engine thread and back."""

    def __init__(self, engine: EngineLoop) -> None:
        self.engine = engine
        self.failed: str | None = None  # why the engine cannot go on
        self._on_failure: Callable[[], None] = lambda: None
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams: dict[str, asyncio.Queue[Delta]] = {}
        self._waiting: dict[str, GenerationRequest] = {}  # not yet given to the engine; order in `_heap`
        self._heap: list[tuple[float, str]] = []
        self._numbers = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="isologit-engine", daemon=True)

    # -- on the event loop ----------------------------------------------------------------------------------------

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Begin; must be called on the event loop. on_failure: called there when the engine cannot go on."""
        self._loop = asyncio.get_running_loop()
        self._on_failure = on_failure
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    @property
    def num_unfinished(self) -> int:
        """Requests that were taken and not yet answered."""
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return max(0, self.num_unfinished - self.engine.scheduler.num_running)

    def new_id(self) -> str:
        """An id no other request of this process has."""
        return f"r{next(self._numbers)}"

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Yield what the request gains, step by step; closing it early cancels the request.

        Raises EngineFailedError when the engine cannot go on.
        """
        if self.failed is not None:
            raise EngineFailedError(self.failed)
        stream: asyncio.Queue[Delta] = asyncio.Queue()
        name = request.request_id
        self._streams[name] = stream
        self._inbox.put(lambda: self._add(request))
        try:
            while True:
                delta = await stream.get()
                yield delta
                if delta.output is not None or delta.error is not None:
                    break
        finally:
            if self._streams.pop(name, None) is not None:
                self._inbox.put(lambda: self._abort(name))

    def _deliver(self, deltas: list[tuple[str, Delta]]) -> None:
        for name, delta in deltas:
            stream = self._streams.get(name)
            if stream is not None:
                if delta.output is not None or delta.error is not None:
                    del self._streams[name]
                stream.put_nowait(delta)

    # -- on the engine thread -------------------------------------------------------------------------------------

    def _send(self, deltas: list[tuple[str, Delta]]) -> None:
        if deltas and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, deltas)

    def _add(self, request: GenerationRequest) -> None:
        self._waiting[request.request_id] = request
        aged = request.params.max_tokens - _AGING_TOKENS_PER_S * time.monotonic()
        heapq.heappush(self._heap, (-aged, request.request_id))

    def _abort(self, name: str) -> None:
        if self._waiting.pop(name, None) is None:
            self.engine.abort(name)

    def _admit(self) -> None:
        """Give the engine as many requests as it has slots: the longest first, as it takes most steps."""
        scheduler = self.engine.scheduler
        while self._heap and scheduler.num_running + scheduler.num_waiting < scheduler.config.max_num_seqs:
            request = self._waiting.pop(heapq.heappop(self._heap)[1], None)
            if request is None:
                continue
            try:
                self.engine.add(request)
            except RequestError as error:
                self._send([(request.request_id, Delta((), error=str(error)))])

    def _work(self) -> None:
        while self._take_inbox() and self.failed is None:
            self._admit()
            if self.engine.has_work():
                self._step()
        if self.failed is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_failure)

    def _take_inbox(self) -> bool:
        """Apply what has arrived, waiting for something when there is no work; False when it is time to end."""
        try:
            while True:
                if self.engine.has_work() or self._waiting:
                    action = self._inbox.get_nowait()
                else:
                    action = self._inbox.get(timeout=_IDLE_S)
                if action is None:
                    return False
                action()
        except Empty:
            return True

    def _step(self) -> None:
        try:
            finished = self.engine.step()
        except Exception as error:  # NOTE: whatever a step raises, the server outlives it
            self._fail_running(error)
            return
        self._failures = 0
        deltas = {gain.request_id: Delta(gain.token_ids, gain.logprobs) for gain in self.engine.gains}
        for output in finished:
            last = deltas.get(output.request_id, Delta(()))
            deltas[output.request_id] = Delta(last.token_ids, last.logprobs, output)
        self._send(list(deltas.items()))
        self.engine.step_records.clear()  # a server never ends

    def _fail_running(self, error: Exception) -> None:
        """Fail the requests that were running; the waiting ones are not touched, unless it keeps happening."""
        logger.exception("a step failed")
        self._failures += 1
        lost = self.engine.drop_running()
        if self._failures >= _MOST_FAILURES_IN_A_ROW:
            self.failed = f"{self._failures} steps in a row failed, the last with {type(error).__name__}"
            lost = list(self._streams)
        message = f"the step failed ({type(error).__name__}); please try again"
        self._send([(name, Delta((), error=message)) for name in lost])
