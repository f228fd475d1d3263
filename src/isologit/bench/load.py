"""Load on a server: every request is sent at its own time, whatever became of the others, and its times are kept.

Owns sockets and the clock. Knows no metric, no file and no verdict.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

import aiohttp

from isologit.bench.answers import problem_with
from isologit.bench.records import LoadPlan, LoadRun, RequestRecord
from isologit.bench.streams import Message, MessageStream
from isologit.errors import UserError

_CONNECT_S = 30.0
_LONGEST_ANSWER_S = 6 * 3600.0
_PROBE_S = 5.0
_SLEEP_STEP_S = 0.001
_SPARE_FILES = 128  # descriptors for everything that is not a connection
_SHOWN = 300
_PORTS = {"http": 80, "https": 443}
_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SERVER_GONE = "the server was found to be gone"
_INTERRUPTED = "the run was interrupted"


class ServerError(UserError):
    """The server cannot be measured: nobody answers, or it refuses the warm-up."""


def run_load(plan: LoadPlan, on_finished: Callable[[RequestRecord], object] | None = None) -> LoadRun:
    """Send all requests and wait for all answers; `on_finished` is told of each as it ends.

    A request that fails does not stop the others, unless nobody listens at the server's address any more: then all that
    are left fail at once. A signal (Ctrl-C, SIGTERM, SIGHUP) ends the run early in the same way, and what was there by
    then is returned. Raises ServerError when nobody listens there to begin with.
    """
    _allow_connections(len(plan.requests))
    return asyncio.run(_Generator(plan, on_finished or (lambda record: None)).run())


async def nobody_answers(url: str) -> str | None:
    """Why no connection can be made to the address of a URL, as one line with the way out; None when one can."""
    parts = urlsplit(url)
    address = f"{parts.scheme}://{parts.netloc}"
    try:
        async with asyncio.timeout(_PROBE_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or _PORTS[parts.scheme])
    except socket.gaierror:
        return f"{address}: there is no host of that name; check --base-url or --host"
    except TimeoutError:
        return f"{address}: no connection within {_PROBE_S:g} s; check --base-url, or --host and --port, and firewalls"
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # those say that we are out of connections
            return None
        ours = f", say with: isologit serve --port {parts.port}" if parts.hostname in _THIS_MACHINE else ""
        return f"nobody answers at {address}; start the server there{ours}, or check --base-url, or --host and --port"
    writer.close()
    return None


class _ServerGone(Exception):
    """Nobody listens at the server's address any more."""


class _TimedOut(Exception):
    """The request took longer than it may."""


class _RequestFailed(Exception):
    """The server answered, but not as it should."""


class _Generator:
    def __init__(self, plan: LoadPlan, on_finished: Callable[[RequestRecord], object]) -> None:
        self._plan = plan
        self._on_finished = on_finished
        self._records = [
            RequestRecord(request, float(due))
            for request, due in zip(plan.requests, plan.arrival_s.tolist(), strict=True)
        ]
        make = plan.dialect.body
        self._bodies = [json.dumps(make(r, plan.model, plan.ignore_eos)).encode() for r in plan.requests]
        limit = plan.max_concurrency
        self._slots = contextlib.nullcontext() if limit is None else asyncio.Semaphore(limit)
        self._zero = 0.0
        self._interrupted = False

    async def run(self) -> LoadRun:
        if why := await nobody_answers(self._plan.url):
            raise ServerError(why)
        gone = False
        timeout = aiohttp.ClientTimeout(total=_LONGEST_ANSWER_S, sock_connect=_CONNECT_S)
        # NOTE: a connection for every request. A kept one may be closed by the server in the moment it is used again,
        # and that failure would be ours.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        headers = {"Content-Type": "application/json", **self._plan.headers}
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
            started_at = time.time()
            self._zero = time.perf_counter()
            try:
                with self._ended_by_signals():
                    await self._send_all(session)
            except* _ServerGone:
                gone = True
        for record in self._records:
            if record.status == "pending" and (gone or self._interrupted):
                record.status = "unsent"
                record.error = f"never sent, for {_INTERRUPTED if self._interrupted else _SERVER_GONE}"
        ends = [record.finished_s for record in self._records if record.finished_s is not None]
        duration_s = max(ends, default=0.0)
        return LoadRun(self._plan, self._records, started_at, duration_s, gone, interrupted=self._interrupted)

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        async with asyncio.TaskGroup() as group:
            for record, body in zip(self._records, self._bodies, strict=True):
                await self._until(record.scheduled_s)
                group.create_task(self._send(session, record, body))

    @contextlib.contextmanager
    def _ended_by_signals(self) -> Iterator[None]:
        """The first signal cancels the block, which then ends as if it were done; a second one changes nothing."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def interrupt() -> None:
            if not self._interrupted:
                self._interrupted = True
                task.cancel()

        before = {number: signal.getsignal(number) for number in _SIGNALS}
        with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread, where signals do not arrive
            for number in _SIGNALS:
                loop.add_signal_handler(number, interrupt)
        try:
            yield
        except asyncio.CancelledError:
            if not self._interrupted:
                raise
            task.uncancel()
        finally:
            for number in _SIGNALS:
                if loop.remove_signal_handler(number):
                    signal.signal(number, before[number])

    async def _send(self, session: aiohttp.ClientSession, record: RequestRecord, body: bytes) -> None:
        record.dispatched_s = self._now()
        try:
            async with self._slots:
                record.sent_s = self._now()
                await self._exchange_in_time(session, record, body)
            record.status = "completed"
        except asyncio.CancelledError:
            if record.sent_s is not None:
                self._fail(record, f"cut off when {_INTERRUPTED if self._interrupted else _SERVER_GONE}")
            raise
        except _RequestFailed as error:
            self._fail(record, str(error))
        except _TimedOut:
            self._fail(record, f"not answered whole within {self._plan.request_timeout_s:g} s (--request-timeout)")
        except (aiohttp.ClientError, OSError) as error:
            self._fail(record, f"{type(error).__name__}: {_one_line(str(error)) or 'the connection broke'}")
            if await nobody_answers(self._plan.url):
                raise _ServerGone from error
        finally:
            self._on_finished(record)

    async def _exchange_in_time(self, session: aiohttp.ClientSession, record: RequestRecord, body: bytes) -> None:
        """Raises _TimedOut past the time one request may take; other time-outs, of connecting say, pass through."""
        try:
            async with asyncio.timeout(self._plan.request_timeout_s) as limit:
                await self._exchange(session, record, body)
        except TimeoutError as error:
            if limit.expired():
                raise _TimedOut from error
            raise

    async def _exchange(self, session: aiohttp.ClientSession, record: RequestRecord, body: bytes) -> None:
        """Post and read until the end of the answer. Raises _RequestFailed when it is none."""
        stream = MessageStream(self._plan.dialect.read, events_only=self._plan.dialect.events_only)
        complete = False
        async with session.post(self._plan.url, data=body) as response:
            if response.status != 200:
                said = _one_line(await response.text(errors="replace"))
                raise _RequestFailed(f"HTTP {response.status}: {said}")
            async for chunk in response.content.iter_any():
                complete |= _take(record, stream.feed(chunk), self._now())
                if stream.ended:
                    break
            complete |= _take(record, stream.finish(), self._now())
        record.finished_s = self._now()
        if record.reported_tokens == 0 and record.token_times_s:
            record.reported_tokens = None  # a count that was never made
        if not complete:
            raise _RequestFailed("the answer broke off before its last message")
        if problem := problem_with(record, ignore_eos=self._plan.ignore_eos):
            raise _RequestFailed(problem)

    def _fail(self, record: RequestRecord, error: str) -> None:
        record.status, record.error = "failed", error
        record.finished_s = self._now()

    async def _until(self, due_s: float) -> None:
        # NOTE: asyncio sleeps whole milliseconds, rounded up. Beside fast answers that is much, so the rest is polled.
        wait = due_s - self._now() - _SLEEP_STEP_S
        if wait > 0:
            await asyncio.sleep(wait)
        while self._now() < due_s:
            await asyncio.sleep(0)

    def _now(self) -> float:
        return time.perf_counter() - self._zero


def _take(record: RequestRecord, messages: Sequence[Message], now_s: float) -> bool:
    """Add messages to the record; whether the last one of the answer is among them. Raises _RequestFailed on errors."""
    complete = False
    for message in messages:
        if message.is_token:
            record.token_times_s.append(now_s)
        if message.full_text is not None:
            record.text = message.full_text
        else:
            record.text += message.text
        record.finish_reason = message.finish_reason or record.finish_reason
        if message.num_tokens is not None:
            record.reported_tokens = message.num_tokens
        if message.num_prompt_tokens is not None:
            record.reported_prompt_tokens = message.num_prompt_tokens
        if message.error is not None:
            raise _RequestFailed(_one_line(message.error))
        complete |= message.final
    return complete


def _allow_connections(n: int) -> None:
    """Raise this process's limit of open files as far as it may, for `n` connections at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_SHOWN]
