"""The judge's load, in a process of its own: it can join the entry's network namespace, and it can be killed.

Sends the requests of a plan, keeps what came when, then draws the secret positions and asks for their rows. Owns
sockets and the clock. It knows no audit, and nothing that an entry sends can do more than fail its own requests.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from isologit.judge import strict_json
from isologit.judge.evidence import ErrorCode, RequestEvidence, RevealedRow
from isologit.judge.positions import draw_positions
from isologit.judge.wire import DIALECTS, REQUEST_ID_HEADER, REVEAL_PATH, ROUND_PATH, Answer, JudgeDialect, WireError

_MOST_ANSWER_BYTES = 64 << 20
_MOST_LINE_BYTES = 4 << 20
_CONNECT_S = 30.0
_SLEEP_STEP_S = 0.001
_PROGRESS_S = 0.5


@dataclass
class ClientPlan:
    """What to send. requests: (id, prompt, max_tokens). arrival_s: ascending seconds. probe: ask for
    log-probabilities as well. reveal_seed: hexadecimal."""

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
    request_s: float
    run_s: float
    silence_s: float
    reveal_rows: int
    reveal_seed: str


@dataclass
class ClientResult:
    """What came of it. problem: why the load could not be applied at all; reveal_problem: why no rows came."""

    records: list[RequestEvidence] = field(default_factory=list)
    revealed: list[RevealedRow] = field(default_factory=list)
    positions: list[tuple[str, int]] = field(default_factory=list)
    duration_s: float | None = None
    problem: str | None = None
    problem_code: ErrorCode | None = None
    reveal_problem: str | None = None


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
        self._slots = asyncio.Semaphore(plan.max_concurrency or len(plan.requests) or 1)
        self.result = ClientResult()

    async def run(self) -> None:
        plan = self._plan
        timeout = aiohttp.ClientTimeout(total=plan.request_s, sock_connect=_CONNECT_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
            try:
                if plan.commit:
                    await self._post(session, ROUND_PATH, {"nonce": plan.nonce})
                for request in plan.warm_up:
                    record = self._record(request, 0.0)
                    await self._answer(session, record)
                    if record.status != "completed":
                        raise _Refused(record.error_code or "status", f"the warm-up failed: {record.error}")
            except _Refused as error:
                self.result.problem, self.result.problem_code = _line(error), error.code
                return
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self.result.problem, self.result.problem_code = _line(error), "connection"
                return
            await self._load(session)
            if plan.commit:
                await self._reveal(session)

    async def _load(self, session: aiohttp.ClientSession) -> None:
        plan = self._plan
        records = [self._record(r, due) for r, due in zip(plan.requests, plan.arrival_s, strict=True)]
        self.result.records = records
        self._zero = time.perf_counter()
        tasks: list[asyncio.Task[None]] = []
        watch = asyncio.ensure_future(self._watch())
        sender = asyncio.ensure_future(self._send_all(session, records, tasks))
        try:
            await asyncio.wait((sender, watch), return_when=asyncio.FIRST_COMPLETED)
            while not watch.done() and (waiting := [task for task in tasks if not task.done()]):
                await asyncio.wait((watch, *waiting), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sender, watch, *tasks):
                task.cancel()
            await asyncio.gather(sender, watch, *tasks, return_exceptions=True)
        for record in records:
            if record.status == "pending":
                _fail(record, "time", "not sent before the run's time was over")
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
            if now > self._plan.run_s or now - self._heard > self._plan.silence_s:
                return

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
            _fail(record, "time", "cut off when the run's time was over")
            raise
        except _Refused as error:
            _fail(record, error.code, _line(error))
        except TimeoutError:
            _fail(record, "time", f"took longer than {self._plan.request_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
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
        async with session.post(url, json=body, headers={REQUEST_ID_HEADER: record.id}) as response:
            if response.status != 200:
                said = (await response.content.read(2000)).decode(errors="replace")
                raise _Refused("status", f"status {response.status}: {' '.join(said.split())[:200]}")
            waiting, size = b"", 0
            async for chunk in response.content.iter_any():
                now = self._heard = self._now()
                size += len(chunk)
                if size > _MOST_ANSWER_BYTES:
                    raise _Refused("size", f"an answer of more than {_MOST_ANSWER_BYTES >> 20} MiB")
                *lines, waiting = (waiting + chunk).split(b"\n")
                if len(waiting) > _MOST_LINE_BYTES:
                    raise _Refused("size", f"a line of more than {_MOST_LINE_BYTES >> 20} MiB")
                tokens = sum(self._read(line, answer) for line in lines)
                if tokens:
                    record.arrivals.append((now, tokens))
            tokens = self._read(waiting, answer)
            if tokens:
                record.arrivals.append((self._now(), tokens))
        record.finished_s = self._now()
        if not answer.ended:
            raise _Refused("end", "the stream ended without the dialect's last message")

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
        except (WireError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise _Refused(
                "dialect", f"a message is not the dialect's: {type(error).__name__}: {_line(error)}"
            ) from None

    async def _reveal(self, session: aiohttp.ClientSession) -> None:
        plan, result = self._plan, self.result
        lengths = {r.id: len(r.token_ids) for r in result.records if r.status == "completed" and r.token_ids}
        result.positions = draw_positions(lengths, bytes.fromhex(plan.reveal_seed), plan.reveal_rows)
        asked = [{"request_id": name, "index": index} for name, index in result.positions]
        try:
            found = await self._post(session, REVEAL_PATH, {"positions": asked})
            for row in found["rows"]:
                hidden = row["hidden"]
                base64.b64decode(hidden, validate=True)
                result.revealed.append(RevealedRow(str(row["request_id"]), int(row["index"]), hidden))
        except (_Refused, aiohttp.ClientError, OSError, TimeoutError, ValueError, TypeError, LookupError) as error:
            result.reveal_problem = _line(error)

    async def _post(self, session: aiohttp.ClientSession, path: str, body: Any) -> Any:
        async with session.post(self._plan.url + path, json=body) as response:
            raw = bytearray()
            async for chunk in response.content.iter_any():
                raw += chunk
                if len(raw) > _MOST_ANSWER_BYTES:
                    raise _Refused("size", f"{path}: an answer of more than {_MOST_ANSWER_BYTES >> 20} MiB")
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


def main(plan_file: str, result_file: str) -> None:
    """`python -m isologit.judge.client PLAN RESULT`, two JSON files."""
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
