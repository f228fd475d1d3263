"""The judge's load, in a process of its own: it can join the entry's network namespace, and it can be killed.

Sends the requests of a plan, keeps what came when, then draws the secret positions and asks for their rows. Owns
sockets and the clock. It knows no audit, and nothing that an entry sends can do more than fail its own requests.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from isologit.judge import strict_json
from isologit.judge.evidence import ErrorCode, RequestEvidence, RevealedRow
from isologit.judge.family import cpu_seconds_below
from isologit.judge.positions import draw_positions
from isologit.judge.wire import DIALECTS, REQUEST_ID_HEADER, REVEAL_PATH, ROUND_PATH, Answer, JudgeDialect, WireError

_MOST_BODY_BYTES = 64 << 20
_ANSWER_BYTES, _TOKEN_BYTES = 256 << 10, 16 << 10  # an answer may have so many, and so many more for each token
_MOST_LINE_BYTES = 1 << 20
_MOST_EXTRA_TOKENS = 64  # beyond what was asked for: enough to see that an answer does not end
_PR_SET_PDEATHSIG = 1
_CONNECT_S = 30.0
_SLEEP_STEP_S = 0.001
_PROGRESS_S = 0.5
_BEAT_S = 0.01


@dataclass
class ClientPlan:
    """What to send. requests: (id, prompt, max_tokens). arrival_s: ascending seconds. probe: ask for
    log-probabilities as well. prepare_s: for nonce and warm-up together. silence_s: without a token of any request.
    reveal_seed: hexadecimal. supervisor_pid: the process below which the entry is, where it is a process here."""

    url: str
    dialect: str
    model: str
    commit: bool
    probe: bool
    nonce: str
    requests: list[tuple[str, str, int]]
    arrival_s: list[float]
    warm_up: list[tuple[str, str, int]]
    max_concurrency: int | None
    prepare_s: float
    request_s: float
    run_s: float
    silence_s: float
    reveal_rows: int
    reveal_seed: str
    supervisor_pid: int | None = None


@dataclass
class ClientResult:
    """What came of it. start_cpu_s: the entry's processor time until the clock started, warm-up included. lag_s: the
    longest time that this process was late to look. problem: why the load could not be applied at all; reveal_problem:
    why no rows came."""

    records: list[RequestEvidence] = field(default_factory=list)
    revealed: list[RevealedRow] = field(default_factory=list)
    positions: list[tuple[str, int]] = field(default_factory=list)
    duration_s: float | None = None
    start_cpu_s: float | None = None
    lag_s: float = 0.0
    problem: str | None = None
    problem_code: ErrorCode | None = None
    reveal_problem: str | None = None


_BROKEN = (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError, TimeoutError)
"""What a connection fails with."""


class _Refused(Exception):
    """The entry's answer is not one; the message says why."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Client:
    def __init__(self, plan: ClientPlan) -> None:
        self._plan = plan
        self._dialect: JudgeDialect = DIALECTS[plan.dialect]
        self._logprobs = plan.probe or not plan.commit
        self._zero = 0.0
        self._heard = 0.0
        self._done = 0
        self._cut = "cut off"
        self._slots = asyncio.Semaphore(plan.max_concurrency or len(plan.requests) or 1)
        self.result = ClientResult()

    async def run(self) -> None:
        plan = self._plan
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=plan.request_s, sock_connect=_CONNECT_S),
            trust_env=False,
            # NOTE: what comes is what was sent: nothing that unpacks to more, and no cookie that tells requests apart.
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            try:
                async with asyncio.timeout(plan.prepare_s):
                    await self._prepare(session)
            except _Refused as error:
                self.result.problem, self.result.problem_code = _line(error), error.code
                return
            except TimeoutError:
                self.result.problem = f"nonce and warm-up took longer than {plan.prepare_s:g} s"
                self.result.problem_code = "time"
                return
            except _BROKEN as error:
                self.result.problem, self.result.problem_code = _line(error), "connection"
                return
            if plan.supervisor_pid is not None:
                self.result.start_cpu_s = cpu_seconds_below(plan.supervisor_pid)
            await self._load(session)
            if plan.commit:
                await self._reveal(session)

    async def _prepare(self, session: aiohttp.ClientSession) -> None:
        plan = self._plan
        if plan.commit:
            await self._post(session, ROUND_PATH, {"nonce": plan.nonce})
        for request in plan.warm_up:
            record = self._record(request, 0.0)
            await self._answer(session, record)
            if record.status != "completed":
                raise _Refused(record.error_code or "status", f"the warm-up failed: {record.error}")

    async def _load(self, session: aiohttp.ClientSession) -> None:
        plan = self._plan
        records = [self._record(r, due) for r, due in zip(plan.requests, plan.arrival_s, strict=True)]
        self.result.records = records
        self._zero, self._heard, self._done = time.perf_counter(), 0.0, 0
        tasks: list[asyncio.Task[None]] = []
        watch = asyncio.ensure_future(self._watch())
        sender = asyncio.ensure_future(self._send_all(session, records, tasks))
        lag = asyncio.ensure_future(self._measure_lag())
        try:
            await asyncio.wait((sender, watch), return_when=asyncio.FIRST_COMPLETED)
            while not watch.done() and (waiting := [task for task in tasks if not task.done()]):
                await asyncio.wait((watch, *waiting), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sender, watch, lag, *tasks):
                task.cancel()
            await asyncio.gather(sender, watch, lag, *tasks, return_exceptions=True)
        for record in records:
            if record.status == "pending":
                _fail(record, "time", self._cut if record.sent_s is not None else f"not sent; {self._cut}")
        ends = [record.finished_s for record in records if record.finished_s is not None]
        self.result.duration_s = max(ends, default=0.0)

    async def _send_all(
        self, session: aiohttp.ClientSession, records: list[RequestEvidence], tasks: list[asyncio.Task[None]]
    ) -> None:
        for record in records:
            wait = record.scheduled_s - self._now() - _SLEEP_STEP_S
            if wait > 0:
                await asyncio.sleep(wait)
            while self._now() < record.scheduled_s:
                await asyncio.sleep(0)
            tasks.append(asyncio.ensure_future(self._answer(session, record)))
        await asyncio.sleep(0)

    async def _watch(self) -> None:
        """Ends when the run took too long or nothing was heard for too long; reports progress meanwhile."""
        while True:
            await asyncio.sleep(_PROGRESS_S)
            now = self._now()
            print(
                json.dumps({"done": self._done, "total": len(self._plan.requests), "second": round(now, 1)}), flush=True
            )
            if now > self._plan.run_s:
                self._cut = f"cut off: the run took longer than {self._plan.run_s:g} s"
                return
            if now - self._heard > self._plan.silence_s:
                self._cut = f"cut off: no token of any request came for {self._plan.silence_s:g} s"
                return

    async def _measure_lag(self) -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(_BEAT_S)
            self.result.lag_s = max(self.result.lag_s, time.perf_counter() - begun - _BEAT_S)

    def _record(self, request: tuple[str, str, int], due_s: float) -> RequestEvidence:
        name, prompt, max_tokens = request
        body = self._dialect.body(self._plan.model, "", 1, self._logprobs)
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return RequestEvidence(name, prompt, max_tokens, digest, due_s)

    async def _answer(self, session: aiohttp.ClientSession, record: RequestEvidence) -> None:
        answer = Answer()
        try:
            async with self._slots:
                record.sent_s = self._now()
                await self._stream(session, record, answer)
            record.status = "completed"
        except asyncio.CancelledError:
            _fail(record, "time", self._cut)
            raise
        except _Refused as error:
            _fail(record, error.code, _line(error))
        except TimeoutError:
            _fail(record, "time", f"took longer than {self._plan.request_s:g} s")
        except _BROKEN as error:
            _fail(record, "connection", f"{type(error).__name__}: {_line(error)}")
        finally:
            self._done += 1
            record.finished_s = record.finished_s or self._now()
            record.token_ids, record.text, record.ended = answer.token_ids, answer.text, answer.ended
            record.finish_reason, record.reported_tokens = answer.finish_reason, answer.reported_tokens
            record.fingerprints = [base64.b64encode(row).decode() for row in answer.fingerprints]
            record.commitments = [base64.b64encode(row).decode() for row in answer.commitments]
            record.top_logprobs = answer.top_logprobs

    async def _stream(self, session: aiohttp.ClientSession, record: RequestEvidence, answer: Answer) -> None:
        plan = self._plan
        body = self._dialect.body(plan.model, record.prompt, record.max_tokens, self._logprobs)
        url = plan.url + self._dialect.path.replace("{model}", plan.model)
        headers = {REQUEST_ID_HEADER: record.id}
        most_bytes = _ANSWER_BYTES + record.max_tokens * _TOKEN_BYTES
        async with session.post(url, json=body, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                said = (await response.content.read(2000)).decode(errors="replace")
                raise _Refused("status", f"status {response.status}: {' '.join(said.split())[:200]}")
            waiting, size = bytearray(), 0
            async for chunk in response.content.iter_any():
                now = self._now()
                size += len(chunk)
                if size > most_bytes:
                    raise _Refused("size", f"an answer of more than {most_bytes >> 10} KiB")
                whole, newline, rest = chunk.rpartition(b"\n")
                if not newline:
                    waiting += rest
                else:
                    lines, waiting = (bytes(waiting) + whole).split(b"\n"), bytearray(rest)
                    self._read_all(lines, now, record, answer)
                if len(waiting) > _MOST_LINE_BYTES:
                    raise _Refused("size", f"a line of more than {_MOST_LINE_BYTES >> 20} MiB")
            self._read_all([bytes(waiting)], self._now(), record, answer)
        record.finished_s = self._now()
        if not answer.ended:
            raise _Refused("end", "the stream ended without the dialect's last message")

    def _read_all(self, lines: list[bytes], now: float, record: RequestEvidence, answer: Answer) -> None:
        """Lines that came together."""
        tokens = sum(self._read(line, answer) for line in lines)
        if tokens:
            self._heard = now
            record.arrivals.append((now, tokens))
        if len(answer.token_ids) > record.max_tokens + _MOST_EXTRA_TOKENS:
            raise _Refused("size", f"does not end: {len(answer.token_ids)} tokens, {record.max_tokens} were asked for")

    def _read(self, line: bytes, answer: Answer) -> int:
        """Tokens in one line of the stream."""
        line = line.strip().removeprefix(b"data:").strip()
        if not line or line.startswith((b":", b"event:", b"id:", b"retry:")):
            return 0
        if answer.ended:
            raise _Refused("dialect", "a message follows the last one")
        if line == b"[DONE]" and self._plan.dialect == "openai":
            answer.ended = answer.finish_reason is not None
            return 0
        try:
            value = strict_json.loads(line)
        except ValueError as error:
            raise _Refused("json", f"a message is not JSON: {_line(error)}") from None
        try:
            return self._dialect.read(value, answer)
        except (WireError, ArithmeticError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise _Refused(
                "dialect", f"a message is not the dialect's: {type(error).__name__}: {_line(error)}"
            ) from None

    async def _reveal(self, session: aiohttp.ClientSession) -> None:
        plan, result = self._plan, self.result
        lengths = {r.id: len(r.token_ids) for r in result.records if r.status == "completed" and r.token_ids}
        result.positions = draw_positions(lengths, bytes.fromhex(plan.reveal_seed), plan.reveal_rows)
        asked = [{"request_id": name, "index": index} for name, index in result.positions]
        wanted = set(result.positions)
        try:
            found = await self._post(session, REVEAL_PATH, {"positions": asked})
            for row in found["rows"]:
                name, index, hidden = row["request_id"], row["index"], row["hidden"]
                base64.b64decode(hidden, validate=True)
                if (name, index) in wanted:
                    result.revealed.append(RevealedRow(name, int(index), hidden))
        except (_Refused, *_BROKEN, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            result.revealed.clear()
            result.reveal_problem = _line(error)

    async def _post(self, session: aiohttp.ClientSession, path: str, body: Any) -> Any:
        async with session.post(self._plan.url + path, json=body, allow_redirects=False) as response:
            raw = bytearray()
            async for chunk in response.content.iter_any():
                raw += chunk
                if len(raw) > _MOST_BODY_BYTES:
                    raise _Refused("size", f"{path}: an answer of more than {_MOST_BODY_BYTES >> 20} MiB")
            if response.status != 200:
                raise _Refused("status", f"{path}: status {response.status}")
        try:
            return strict_json.loads(bytes(raw))
        except ValueError as error:
            raise _Refused("json", f"{path}: {error}") from None

    def _now(self) -> float:
        return time.perf_counter() - self._zero


def apply_load(plan: ClientPlan) -> ClientResult:
    """Run the plan in this process."""
    client = _Client(plan)

    async def whole() -> None:
        await client.run()

    asyncio.run(whole())
    return client.result


def main(plan_file: str, result_file: str, judge_pid: str) -> None:
    """`python -m isologit.judge.client PLAN RESULT JUDGE_PID`, two JSON files and the process that it ends with."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(judge_pid):
        return
    plan = ClientPlan(**json.loads(Path(plan_file).read_text(encoding="utf-8")))
    partial = Path(result_file + ".partial")
    partial.write_text(json.dumps(asdict(apply_load(plan)), allow_nan=False), encoding="utf-8")
    partial.replace(result_file)


def _fail(record: RequestEvidence, code: ErrorCode, error: str) -> None:
    record.status, record.error_code, record.error = "failed", code, error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
