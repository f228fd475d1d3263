"""Load on a server with clients that leave and clients that are wrong: is anything lost, and does anything stay behind?

    python -m benchmarks.soak --minutes 20

Starts `isologit serve` as a process, sends 1500 requests at once and then keeps a steady rate near what that showed the
server can do, and writes benchmarks/results/soak.json. Exit code 0: nothing was lost and nothing leaked, 1: something
was. The driver is used by the tests as well, on a server of their own and for some seconds.

Every good request is compared with the text that the engine gives offline, and the server's counters with the
client's.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from isologit import LLM, RequestOutput, SamplingParams
from isologit.bench.dialects import DIALECTS, LoadRequest
from isologit.bench.streams import MessageStream
from isologit.common.environment import describe_environment
from isologit.common.files import write_json
from isologit.common.processes import server_process
from isologit.workload import builtin_requests, demo_model_path

RESULT = Path(__file__).parent / "results" / "soak.json"
NEAR_CAPACITY = 0.8  # of the rate at which the burst was answered
SAMPLE_S = 5.0
LONGEST_ANSWER_S = 300.0
MOST_GROWTH_MIB = 16.0  # of the server's memory, from the second quarter of the steady part to the last
SPARE_FILES = 2  # descriptors that may be open at the end beyond those at the start
MODEL = "llama2"  # every server answers to the contest's name
WHOLE_PATHS = {
    "llm-serving": f"/models/{MODEL}/generate",
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
    "tgi": "/generate",
}
BAD: Sequence[tuple[str, bytes]] = [
    ("/v1/completions", b"{"),
    ("/v1/completions", b'{"model": "none", "prompt": "a"}'),
    ("/v1/completions", b'{"model": "llama2", "prompt": "a", "max_tokens": 1000000}'),
    ("/v1/completions", b'{"model": "llama2", "prompt": "\\ud800"}'),
    ("/v1/chat/completions", b'{"model": "llama2", "messages": []}'),
    ("/generate", b"[]"),
    ("/generate", b'{"inputs": "a", "parameters": {"temperature": -1}}'),
    ("/generate_stream", b'{"inputs": "", "parameters": {}}'),
    ("/models/llama2/generate", b"{}"),
    ("/models/none/generate_stream", b'{"inputs": "a"}'),
    ("/nowhere", b"{}"),
]


@dataclass(frozen=True)
class Expected:
    """What the engine answers offline."""

    num_prompt_tokens: int
    text: str
    num_tokens: int


@dataclass(frozen=True)
class Case:
    """A prompt, and what is answered to it as it is and as a message of a chat."""

    prompt: str
    max_tokens: int
    plain: Expected
    chat: Expected


def make_cases(llm: LLM, count: int, max_tokens: int | None = None) -> list[Case]:
    """Built-in prompts with their answers; `max_tokens` shortens them."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    specs = [spec for spec in builtin_requests(count) if spec.prompt]
    prompts = [spec.prompt or "" for spec in specs]
    limits = [min(spec.max_new_tokens, max_tokens or spec.max_new_tokens) for spec in specs]
    plain = [tokenizer.encode(prompt) for prompt in prompts]
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    ids = [*plain, *(tokenizer.encode_without_bos(chat) for chat in chats)]
    params = [SamplingParams(max_tokens=limit) for limit in limits]
    outputs = llm.generate([{"prompt_token_ids": one} for one in ids], [*params, *params], use_tqdm=False)

    def expected(output: RequestOutput) -> Expected:
        return Expected(len(output.prompt_token_ids), output.text, len(output.token_ids))

    found = [expected(output) for output in outputs]
    return [
        Case(prompt, limit, *pair)
        for prompt, limit, pair in zip(
            prompts, limits, zip(found[: len(prompts)], found[len(prompts) :], strict=True), strict=True
        )
    ]


@dataclass
class Load:
    """Sends requests of every dialect, whole and streamed, and keeps account of what became of them."""

    url: str
    cases: Sequence[Case]
    seed: int = 0
    leaving_share: float = 0.05
    bad_share: float = 0.05
    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)  # of refusals
    problems: list[str] = field(default_factory=list)
    prompt_tokens: int = 0  # of requests the server must have taken
    answered_tokens: int = 0  # of complete answers
    most_left_tokens: int = 0  # that clients who left may have been given
    ttft_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Load:
        """Open the client."""
        timeout = aiohttp.ClientTimeout(total=LONGEST_ANSWER_S)
        self._session = aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it, with all connections."""
        assert self._session is not None
        await self._session.close()
        await asyncio.sleep(0.1)

    async def burst(self, count: int) -> float:
        """So many requests at once; returns the seconds until the last was over."""
        start = time.perf_counter()
        await asyncio.gather(*[self._draw()() for _ in range(count)])
        return time.perf_counter() - start

    async def steady(self, rate: float, seconds: float) -> None:
        """Requests with exponential gaps (a Poisson process), whatever becomes of them; returns when all are over."""
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        due = loop.time()
        end = due + seconds
        while (due := due + self._random.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, due - loop.time()))
            task = asyncio.ensure_future(self._draw()())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    def _draw(self) -> Callable[[], Awaitable[None]]:
        """The next request, drawn from the seed whatever happened to the others."""
        choice, case = self._random.random(), self._random.choice(self.cases)
        backend, streams = self._random.choice(list(WHOLE_PATHS)), self._random.random() < 0.5
        wrong = self._random.randrange(len(BAD) + 1)
        if choice < self.bad_share:
            return lambda: self._account(self._bad(wrong), f"bad request {wrong}")
        if choice < self.bad_share + self.leaving_share:
            return lambda: self._account(self._leave(backend, case), f"{backend}, leaving")
        return lambda: self._account(self._good(backend, case, streams), f"{backend}, stream={streams}")

    async def _account(self, request: Awaitable[None], what: str) -> None:
        try:
            await request
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            self.counts["lost"] += 1
            self.problems.append(f"{what}: {type(error).__name__}: {error}")

    def _body(self, backend: str, case: Case) -> dict[str, Any]:
        request = LoadRequest("", case.prompt, None, None, case.max_tokens)
        return DIALECTS[backend].body(request, MODEL, False)

    def _take(self, backend: str, case: Case) -> Expected:
        expected = case.chat if backend == "openai-chat" else case.plain
        self.prompt_tokens += expected.num_prompt_tokens
        return expected

    async def _good(self, backend: str, case: Case, streams: bool) -> None:
        assert self._session is not None
        self.counts["good"] += 1
        start = time.perf_counter()
        body = self._body(backend, case)
        if streams:
            path = DIALECTS[backend].endpoint.format(model=MODEL)
            text = await self._read(backend, path, body, start)
        else:
            body = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
            async with self._session.post(WHOLE_PATHS[backend], json=body) as response:
                text = _text(await response.json()) if response.status == 200 else f"status {response.status}"
        self.e2e_s.append(time.perf_counter() - start)
        expected = self._take(backend, case)
        self.answered_tokens += expected.num_tokens
        if text == expected.text:
            self.counts["answered"] += 1
        else:
            self.counts["wrong"] += 1
            self.problems.append(f"{backend}, stream={streams}: {text!r} instead of {expected.text!r}")

    async def _read(self, backend: str, path: str, body: dict[str, Any], start: float) -> str:
        """The text of a stream, or what was wrong with it."""
        assert self._session is not None
        stream, text, final, first = MessageStream(DIALECTS[backend].read), "", False, True
        async with self._session.post(path, json=body) as response:
            if response.status != 200:
                return f"status {response.status}"
            async for data in response.content.iter_any():
                if first:
                    self.ttft_s.append(time.perf_counter() - start)
                    first = False
                for message in stream.feed(data):
                    if message.error:
                        return f"error {message.error}"
                    text += message.text
                    final = final or message.final
        return text if final else f"cut off after {text!r}"

    async def _leave(self, backend: str, case: Case) -> None:
        """Read the beginning of a stream, then disconnect."""
        assert self._session is not None
        self.counts["leaving"] += 1
        path = DIALECTS[backend].endpoint.format(model=MODEL)
        async with self._session.post(path, json=self._body(backend, case)) as response:
            if response.status != 200:
                raise ValueError(f"status {response.status}")
            await response.content.readany()
            response.close()
        self.most_left_tokens += self._take(backend, case).num_tokens

    async def _bad(self, number: int) -> None:
        assert self._session is not None
        self.counts["bad"] += 1
        if number == len(BAD):  # half a request
            url = urlsplit(self.url)
            _, writer = await asyncio.open_connection(url.hostname, url.port)
            writer.write(b'POST /generate HTTP/1.1\r\nhost: soak\r\ncontent-length: 100\r\n\r\n{"inputs')
            await writer.drain()
            writer.close()
            self.counts["refused"] += 1
            return
        path, data = BAD[number]
        headers = {"content-type": "application/json"}
        async with self._session.post(path, data=data, headers=headers) as response:
            await response.read()
            self.statuses[response.status] += 1
            if 400 <= response.status < 500:
                self.counts["refused"] += 1
            else:
                self.problems.append(f"bad request {number} was answered with {response.status}")


def _text(answer: dict[str, Any]) -> str:
    if "choices" in answer:
        choice = answer["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    return str(answer["generated_text"])


Metrics = dict[str, float]


def read_metrics(text: str) -> Metrics:
    """Values by name, the label that tells samples of one name apart added in braces."""
    found: Metrics = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = sample.labels.get("finished_reason") or sample.labels.get("status")
            found[f"{sample.name}{{{label}}}" if label else sample.name] = sample.value
    return found


async def settled(url: str, timeout_s: float = 60.0) -> Metrics:
    """The server's metrics once nothing runs or waits any more."""
    async with aiohttp.ClientSession(url) as session:
        deadline = time.monotonic() + timeout_s
        while True:
            async with session.get("/metrics") as response:
                found = read_metrics(await response.text())
            if not found["vllm:num_requests_running"] and not found["vllm:num_requests_waiting"]:
                return found
            if time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.1)


def disagreements(load: Load, before: Metrics, after: Metrics) -> list[str]:
    """What the client's account and the server's counters say differently, and what was lost."""

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    counts, found = load.counts, list(load.problems)

    def require(holds: bool, text: str) -> None:
        if not holds:
            found.append(text)

    success = sum(grown(name) for name in after if name.startswith("vllm:request_success_total"))
    unanswered = grown("isologit:requests_unanswered_total")
    taken = counts["good"] + counts["leaving"]
    require(counts["answered"] == counts["good"], f"{counts['answered']} of {counts['good']} good requests answered")
    require(counts["refused"] == counts["bad"], f"{counts['refused']} of {counts['bad']} bad requests refused")
    require(success + unanswered == taken, f"the server ended {success:g} + {unanswered:g} of {taken} requests")
    require(unanswered <= counts["leaving"], f"{unanswered:g} unanswered, and only {counts['leaving']} clients left")
    prompts = grown("vllm:prompt_tokens_total")
    require(prompts == load.prompt_tokens, f"{prompts:g} prompt tokens counted, {load.prompt_tokens} sent")
    tokens, most = grown("vllm:generation_tokens_total"), load.answered_tokens + load.most_left_tokens
    require(load.answered_tokens <= tokens <= most, f"{tokens:g} tokens, not {load.answered_tokens} to {most}")
    for status in {*load.statuses, 400, 404, 408, 413, 422, 429, 500, 503, 504}:
        theirs = grown(f"isologit:http_responses_total{{{status}}}")
        require(theirs == load.statuses[status], f"status {status}: {theirs:g} sent, {load.statuses[status]} received")
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        require(after[name] == 0, f"{name} is {after[name]:g} at the end")
    require(
        after["isologit:tasks"] <= before["isologit:tasks"],
        f"{after['isologit:tasks']:g} tasks at the end, {before['isologit:tasks']:g} at the start",
    )
    return found


# -- a server process -------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """What the server's process holds, over time."""

    process: psutil.Process
    rows: list[dict[str, float]] = field(default_factory=list)

    def take(self, at_s: float) -> dict[str, float]:
        """One row, kept."""
        with self.process.oneshot():
            row = {
                "at_s": round(at_s, 1),
                "rss_mib": round(self.process.memory_info().rss / 2**20, 1),
                "fds": float(self.process.num_fds()),
                "threads": float(self.process.num_threads()),
            }
        self.rows.append(row)
        return row

    async def keep_taking(self, load: Load) -> None:
        """A row every few seconds, and a line on the screen each."""
        start = time.perf_counter()
        while True:
            row = self.take(time.perf_counter() - start)
            print(f"{row['at_s']:7.0f} s  {row['rss_mib']:7.1f} MiB  {row['fds']:4.0f} files  {dict(load.counts)}")
            await asyncio.sleep(SAMPLE_S)

    def growth_mib(self) -> float:
        """From the second quarter to the last: while the caches fill at the beginning, memory grows as it should."""
        values = [row["rss_mib"] for row in self.rows]
        quarter = max(1, len(values) // 4)
        return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter] or values)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds at 50, 90 and 99 %."""
    ordered = sorted(seconds) or [0.0]
    return {f"p{p}_ms": round(1e3 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 1) for p in (50, 90, 99)}


async def soak(minutes: float, burst: int, seed: int, cases: Sequence[Case], options: Sequence[str]) -> dict[str, Any]:
    """Run and judge."""
    command = [sys.executable, "-m", "isologit", "serve", "--port", "0", *options]
    with server_process(command) as server:
        url, process = server.url, psutil.Process(server.pid)
        samples = Samples(process)
        async with Load(url, cases[:50], seed=seed + 1) as warm:
            await warm.burst(200)
        before, first = await settled(url), samples.take(0.0)
        samples.rows.clear()
        load = Load(url, cases, seed=seed)
        async with load:
            burst_s = await load.burst(burst)
            rate = NEAR_CAPACITY * burst / burst_s
            burst_figures = {"requests": burst, "seconds": round(burst_s, 2), "ttft": percentiles(load.ttft_s)}
            load.ttft_s, load.e2e_s = [], []
            sampling = asyncio.ensure_future(samples.keep_taking(load))
            start = time.perf_counter()
            await load.steady(rate, 60 * minutes)
            steady_s = time.perf_counter() - start
            sampling.cancel()
        after = await settled(url)
        await asyncio.sleep(1)
        last = Samples(process).take(steady_s)
    problems = disagreements(load, before, after)
    if last["fds"] > first["fds"] + SPARE_FILES:
        problems.append(f"{last['fds']:g} open files at the end, {first['fds']:g} at the start")
    if last["threads"] > first["threads"]:
        problems.append(f"{last['threads']:g} threads at the end, {first['threads']:g} at the start")
    growth = samples.growth_mib()
    if growth > MOST_GROWTH_MIB:
        problems.append(f"memory grew by {growth:.1f} MiB")
    return {
        "what": "isologit serve under load, 5 % of the clients leaving mid-stream and 5 % sending bad requests",
        "verdict": "FAILED" if problems else "PASSED",
        "problems": problems[:50],
        "num_problems": len(problems),
        "seed": seed,
        "burst": burst_figures,
        "steady": {
            "minutes": minutes,
            "offered_requests_per_s": round(rate, 2),
            "share_of_burst_rate": NEAR_CAPACITY,
            "seconds": round(steady_s, 1),
            "ttft": percentiles(load.ttft_s),
            "e2e": percentiles(load.e2e_s),
        },
        "client": {**dict(load.counts), "prompt_tokens": load.prompt_tokens, "answered_tokens": load.answered_tokens},
        "refusals": {str(status): count for status, count in sorted(load.statuses.items())},
        "server": {name: after[name] - before.get(name, 0.0) for name in sorted(after) if name.endswith("_total")}
        | {name: value - before.get(name, 0.0) for name, value in after.items() if "_total{" in name},
        "memory_growth_mib": round(growth, 1),
        "first": first,
        "last": last,
        "samples": samples.rows,
        "options": list(options),
        "environment": describe_environment(),
        "client_versions": {name: version(name) for name in ("aiohttp", "fastapi", "uvicorn", "httptools", "psutil")},
        "note": "client and server share the machine's cores",
    }


def main() -> None:
    """Parse, run, write, exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of steady load")
    parser.add_argument("--burst", type=int, default=1500, help="requests at once before that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("options", nargs="*", help="for isologit serve, after --")
    asked = parser.parse_args()
    llm = LLM(demo_model_path())
    try:
        cases = make_cases(llm, 300)
    finally:
        llm.close()
    result = asyncio.run(soak(asked.minutes, asked.burst, asked.seed, cases, asked.options))
    write_json(asked.output, result)
    print(f"{result['verdict']}: {asked.output}")
    for problem in result["problems"]:
        print(f"  {problem}")
    raise SystemExit(0 if result["verdict"] == "PASSED" else 1)


if __name__ == "__main__":
    main()
