"""The engine on a thread of its own, and its requests as asynchronous streams.

Owns the hand-over between the two worlds: what arrives is applied between steps, and a step's new tokens go back in
one call, however many requests they belong to. It does not know HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np

from isologit.common.logs import log_error
from isologit.engine.loop import EngineLoop
from isologit.engine.request import GenerationRequest, RequestOutput
from isologit.engine.request_limits import RequestLimits
from isologit.errors import IsologitError, RequestError

_MOST_FAILURES_IN_A_ROW = 3


class EngineFailedError(IsologitError):
    """The step a request took part in failed, or the engine cannot go on."""


class ClientGoneError(IsologitError):
    """Nobody is there to be answered."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A request's new tokens of one step; `output` is its whole result, when it is over.

    texts: what each token made certain, often nothing; all of a request's, joined, are its text with what a stop string
    cuts off. shown: what may be shown since each token, held back while it may begin a stop string; all of a request's,
    joined, are `output.text`. logprobs: empty if none were asked for. at_s: end of the step on the clock
    `time.perf_counter`. hidden: as in `StepDelta`.
    """

    token_ids: Sequence[int]
    texts: Sequence[str]
    shown: Sequence[str]
    logprobs: Sequence[dict[int, float]]
    output: RequestOutput | None
    at_s: float
    hidden: np.ndarray | None = None


class Stream:
    """The requests that one client asked for together, on the event loop: what they gain, and their end.

    A reader never holds up the engine: what it has not taken yet waits here, at most the tokens its requests may have.
    """

    def __init__(
        self, engine: AsyncEngine, names: Sequence[str], observe: Callable[[int, Delta], None], *, whole: bool
    ) -> None:
        self._engine = engine
        self._open = {name: index for index, name in enumerate(names)}
        self._observe = observe
        self._whole = whole
        self._pending: list[tuple[int, Delta]] = []
        self._error: IsologitError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> list[tuple[int, Delta]]:
        """What was gained since the last call, as (index of the request, delta); nothing only when all are over.

        Of a `whole` stream everything at once. Raises the error of the first request that failed, and ClientGoneError
        after `close`.
        """
        while self._open and (self._whole or not self._pending):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        taken, self._pending = self._pending, []
        return taken

    def close(self) -> None:
        """Cancel what is not over yet; a reader that waits is told."""
        self.fail(ClientGoneError("the client has left"))

    def fail(self, error: IsologitError) -> None:
        """End with an error, cancelling what is not over yet; without effect when everything is over."""
        if self._open:
            self._error = error
            self._engine.cancel(self._open)
            self._open = {}
            self._wake()

    def push(self, name: str, delta: Delta) -> None:
        """Called by the engine's side, on the event loop."""
        index = self._open[name]
        self._observe(index, delta)
        self._pending.append((index, delta))
        if delta.output is not None:
            del self._open[name]
        if not self._whole or not self._open:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngine:
    """Requests from an event loop to the engine thread and back."""

    def __init__(self, engine: EngineLoop) -> None:
        self.engine = engine
        self.failed: str | None = None  # why the engine cannot go on
        self._on_failure: Callable[[], None] = lambda: None
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._numbers = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="isologit-engine", daemon=True)

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
    def limits(self) -> RequestLimits:
        """What a request may be."""
        return self.engine.scheduler.limits

    @property
    def max_num_seqs(self) -> int:
        """Slots: requests that may run at once."""
        return self.engine.scheduler.config.max_num_seqs

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

    def submit(
        self, requests: Sequence[GenerationRequest], observe: Callable[[int, Delta], None], *, whole: bool
    ) -> Stream:
        """Take requests; the stream must be closed. observe: called at once with everything a request gains.

        Raises EngineFailedError when the engine cannot go on.
        """
        if self.failed is not None:
            raise EngineFailedError(self.failed)
        stream = Stream(self, [request.request_id for request in requests], observe, whole=whole)
        for request in requests:
            self._streams[request.request_id] = stream
        self._inbox.put(lambda: self._add(requests))
        return stream

    def cancel(self, names: Sequence[str] | dict[str, int]) -> None:
        """Forget requests; the engine drops them before its next step."""
        for name in names:
            self._streams.pop(name, None)
        self._inbox.put(lambda: self._abort(list(names)))

    def _deliver(self, deltas: list[tuple[str, Delta]]) -> None:
        for name, delta in deltas:
            stream = self._streams.get(name)
            if stream is None:
                continue
            if delta.output is not None:
                del self._streams[name]
            if delta.output is not None and delta.output.error is not None:
                stream.fail(EngineFailedError(delta.output.error))
            else:
                stream.push(name, delta)

    def _deliver_failure(self, names: Sequence[str], message: str) -> None:
        for name in names:
            stream = self._streams.get(name)
            if stream is not None:
                stream.fail(EngineFailedError(message))

    def _leave(self) -> None:
        """The engine has stopped for good: nobody waits for it any longer."""
        assert self.failed is not None
        self._deliver_failure(list(self._streams), self.failed)
        self._on_failure()

    # -- on the engine thread -------------------------------------------------------------------------------------

    def _call(self, what: Callable[..., None], *arguments: object) -> None:
        """Have something done on the event loop, if there still is one."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended before the engine
            self._loop.call_soon_threadsafe(what, *arguments)

    def _add(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            try:
                self.engine.add(request)
            except RequestError as error:
                self._call(self._deliver_failure, [request.request_id], str(error))

    def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            self.engine.abort(name)

    def _run(self) -> None:
        try:
            while self.failed is None and self._take_inbox():
                if self.engine.has_work():
                    self._step()
        except Exception as error:  # NOTE: a thread that ended in silence would leave every client waiting
            self.failed = f"the engine stopped with {type(error).__name__}"
            log_error("the engine stopped", error)
        if self.failed is not None:
            self._call(self._leave)

    def _take_inbox(self) -> bool:
        """Apply what has arrived, waiting for something when there is no work; False when it is time to end."""
        try:
            while True:
                action = self._inbox.get(block=not self.engine.has_work())
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
        now = time.perf_counter()
        over = {output.request_id: output for output in finished}
        deltas = [
            (
                new.request_id,
                Delta(
                    new.token_ids,
                    new.texts,
                    new.shown,
                    new.logprobs,
                    over.pop(new.request_id, None),
                    now,
                    new.hidden,
                ),
            )
            for new in self.engine.deltas
        ]
        deltas += [(name, Delta((), (), (), (), output, now)) for name, output in over.items()]
        if deltas:
            self._call(self._deliver, deltas)
        self.engine.step_records.clear()  # a server never ends

    def _fail_running(self, error: Exception) -> None:
        """Fail the requests that were running; the waiting ones are not touched, unless it keeps happening."""
        self._failures += 1
        log_error("a step failed", error)
        lost = self.engine.drop_running()
        self._call(self._deliver_failure, lost, f"the step failed ({type(error).__name__}); please try again")
        if self._failures >= _MOST_FAILURES_IN_A_ROW:
            self.failed = f"{self._failures} steps in a row failed, the last with {type(error).__name__}"
