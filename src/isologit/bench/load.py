"""Load on a server: every request is sent at its own time, whatever became of the others, and its times are kept.

Owns sockets and the clock. Knows no metric, no file and no verdict.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import aiohttp

from isologit.bench.arrivals import Seconds
from isologit.bench.dialects import Dialect, LoadRequest
from isologit.bench.streams import Message, MessageStream
from isologit.errors import UserError

_CONNECT_S = 30.0
_LONGEST_ANSWER_S = 6 * 3600.0
_PROBE_S = 5.0
_SLEEP_STEP_S = 0.001
_SPARE_FILES = 128  # descriptors for everything that is not a connection
_SHOWN = 300

Status = Literal["pending", "completed", "failed", "unsent"]
_CUT_OFF = "the connection was cut off when the server was found to be gone"
_UNSENT = "never sent, for the server was gone"


class ServerError(UserError):
    """The server cannot be measured: nobody answers, or it refuses the warm-up."""


@dataclass(frozen=True)
class LoadPlan:
    """What to send where and when.

    url: where requests are posted. arrival_s: ascending seconds [n] after the start. `max_concurrency` holds requests
    back on this side while that many are being answered; None is an open loop.
    """

    url: str
    dialect: Dialect
    model: str
    requests: Sequence[LoadRequest]
    arrival_s: Seconds
    max_concurrency: int | None = None
    ignore_eos: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class RequestRecord:
    """What became of one request; times are seconds since the first scheduled time, None for what never happened.

    scheduled_s: when it was due. dispatched_s: when this program got to it. sent_s: when it was sent, later than that
    only under `max_concurrency`. token_times_s: arrival of every message that carried a token. finished_s: end of the
    answer, or of the failure.
    """

    request: LoadRequest
    scheduled_s: float
    dispatched_s: float | None = None
    sent_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    finished_s: float | None = None
    status: Status = "pending"
    text: str = ""
    finish_reason: str | None = None
    reported_tokens: int | None = None
    error: str | None = None

    @property
    def first_token_s(self) -> float | None:
        """When the answer began; an answer without any token begins at its end."""
        return self.token_times_s[0] if self.token_times_s else self.finished_s


@dataclass(frozen=True)
class LoadRun:
    """Every request of the plan with what became of it, in the plan's order.

    duration_s: from the first scheduled time to the last answer. started_at: seconds since the epoch.
    """

    plan: LoadPlan
    records: list[RequestRecord]
    started_at: float
    duration_s: float
    server_gone: bool


def run_load(plan: LoadPlan, on_finished: Callable[[RequestRecord], object] | None = None) -> LoadRun:
    """Send all requests and wait for all answers; `on_finished` is told of each as it ends.

    A request that fails does not stop the others, unless nobody listens at the server's address any more: then all that
    are left fail at once. Raises ServerError when nobody listens there to begin with.
    """
    _allow_connections(len(plan.requests))
    return asyncio.run(_Generator(plan, on_finished or (lambda record: None)).run())


class _ServerGone(Exception):
    """Nobody listens at the server's address any more."""


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

    async def run(self) -> LoadRun:
        if await self._server_is_gone():
            parts = urlsplit(self._plan.url)
            raise ServerError(
                f"nobody answers at {parts.scheme}://{parts.netloc}; start the server first, say with: isologit serve"
            )
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
                async with asyncio.TaskGroup() as group:
                    for record, body in zip(self._records, self._bodies, strict=True):
                        await self._until(record.scheduled_s)
                        group.create_task(self._send(session, record, body))
            except* _ServerGone:
                gone = True
        for record in self._records:
            if gone and record.status == "pending":
                record.status, record.error = "unsent", _UNSENT
        ends = [record.finished_s for record in self._records if record.finished_s is not None]
        return LoadRun(self._plan, self._records, started_at, max(ends, default=0.0), gone)

    async def _send(self, session: aiohttp.ClientSession, record: RequestRecord, body: bytes) -> None:
        record.dispatched_s = self._now()
        try:
            async with self._slots:
                record.sent_s = self._now()
                await self._exchange(session, record, body)
            record.status = "completed"
        except asyncio.CancelledError:
            if record.sent_s is not None:
                self._fail(record, _CUT_OFF)
            raise
        except _RequestFailed as error:
            self._fail(record, str(error))
        except (aiohttp.ClientError, OSError) as error:
            self._fail(record, f"{type(error).__name__}: {_one_line(str(error)) or 'the connection broke'}")
            if await self._server_is_gone():
                raise _ServerGone from error
        finally:
            self._on_finished(record)

    async def _exchange(self, session: aiohttp.ClientSession, record: RequestRecord, body: bytes) -> None:
        """Post and read until the end of the answer. Raises _RequestFailed when it is none."""
        stream = MessageStream(self._plan.dialect.read)
        complete = False
        async with session.post(self._plan.url, data=body) as response:
            if response.status != 200:
                said = _one_line(await response.text(errors="replace"))
                raise _RequestFailed(f"HTTP {response.status}: {said}")
            async for chunk in response.content.iter_any():
                complete |= _take(record, stream.feed(chunk), self._now())
            complete |= _take(record, stream.finish(), self._now())
        record.finished_s = self._now()
        if not complete:
            raise _RequestFailed("the answer broke off before its last message")

    def _fail(self, record: RequestRecord, error: str) -> None:
        record.status, record.error = "failed", error
        record.finished_s = self._now()

    async def _server_is_gone(self) -> bool:
        """Whether nobody accepts connections at the server's address."""
        parts = urlsplit(self._plan.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            async with asyncio.timeout(_PROBE_S):
                _, writer = await asyncio.open_connection(parts.hostname, port)
        except OSError as error:
            return error.errno not in (errno.EMFILE, errno.ENFILE)  # those say that we are out of connections
        writer.close()
        return False

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
