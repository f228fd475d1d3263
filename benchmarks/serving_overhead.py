"""What HTTP costs: the built-in requests offline, and the same requests sent all at once to a server, in every dialect.

    python -m benchmarks.serving_overhead
    python -m benchmarks.serving_overhead --model llama-110m --load-format dummy --tokenizer DIR --requests 200
    python -m benchmarks.serving_overhead --backends tgi --ways stream --repeats 5

Every case, offline or a dialect with whole answers or streams, runs once a repeat, in processes of its own and with the
same options. Repeats begin at another case each, so that a machine that slows down slows no case more than another.
Clocks start after loading, warming up and one short request that is not measured: offline from the first request given
to the engine to the last output, over HTTP from the first byte sent to the last byte received. All must give the same
texts. The client runs on the same cores as the server, so its own
cost is part of what is measured. On the built-in model a step takes about a millisecond, so HTTP weighs most there.
Bar: 5 % added.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from isologit.bench.dialects import DIALECTS, LoadRequest
from isologit.bench.streams import MessageStream
from isologit.common.environment import describe_environment
from isologit.common.files import write_json
from isologit.common.processes import ServerProcess, server_process
from isologit.workload import builtin_requests

RESULTS = Path(__file__).parent / "results"
BAR = 0.05
MODEL = "llama2"
Case = tuple[str, str]  # dialect, and "whole" or "stream"
Run = Mapping[str, Any]  # seconds, processor seconds, output tokens and the hash of all texts
WHOLE = {"openai": "/v1/completions", "tgi": "/generate", "llm-serving": f"/models/{MODEL}/generate"}
WARM_UP = LoadRequest("warm-up", "Hello", None, None, 2)


def run_offline(asked: argparse.Namespace) -> Run:
    """In this process; also the number of steps."""
    from isologit import LLM, GenerationRequest, SamplingParams
    from isologit.workload import demo_model_path

    llm = LLM(
        asked.model or demo_model_path(),
        load_format=asked.load_format,
        tokenizer=asked.tokenizer,
        max_num_seqs=asked.max_num_seqs,
        speculative_config=None,
    )
    assert llm.tokenizer is not None
    warm_up, *requests = [
        GenerationRequest(spec.id, llm.tokenizer.encode(spec.prompt or ""), SamplingParams(spec.max_new_tokens))
        for spec in [WARM_UP, *builtin_requests(asked.requests)]
    ]
    llm.warm_up()
    list(llm.run([warm_up]))
    start, cpu = time.perf_counter(), time.process_time()
    outputs = list(llm.run(requests))
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    texts = {output.request_id: output.text for output in outputs}
    found = {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "output_tokens": sum(len(output.token_ids) for output in outputs),
        "texts_sha256": texts_sha256([texts[request.request_id] for request in requests]),
        "steps": len(llm.step_records),
    }
    llm.close()
    return found


def texts_sha256(texts: Sequence[str]) -> str:
    """Of all texts in the order of the requests."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def read_answer(content: bytes, backend: str, streams: bool) -> tuple[str, int]:
    """The text of an answer, whole or all of a stream, and its output tokens as the server counts them."""
    if streams:
        stream = MessageStream(DIALECTS[backend].read)
        messages = [*stream.feed(content), *stream.finish()]
        if errors := [message.error for message in messages if message.error is not None]:
            raise SystemExit(errors[0])
        pieces = "".join(message.text for message in messages)
        wholes = [message.full_text for message in messages if message.full_text is not None]
        return wholes[-1] if wholes else pieces, max(message.num_tokens or 0 for message in messages)
    found = json.loads(content)
    if "usage" in found:
        return found["choices"][0]["text"], found["usage"]["completion_tokens"]
    return found["generated_text"], (found.get("details") or found)["generated_tokens"]


async def over_http(server: ServerProcess, requests: Sequence[LoadRequest], backend: str, streams: bool) -> Run:
    """All requests at once; processor time of server and client apart. Answers are read when the clock has stopped."""
    dialect = DIALECTS[backend]
    path = dialect.endpoint.format(model=MODEL) if streams else WHOLE[backend]

    def body(request: LoadRequest) -> bytes:
        found = dialect.body(request, MODEL, False)
        left_out = () if streams else ("stream", "stream_options")
        return json.dumps({key: value for key, value in found.items() if key not in left_out}).encode()

    async def one(session: aiohttp.ClientSession, body: bytes) -> bytes:
        async with session.post(path, data=body, headers={"content-type": "application/json"}) as response:
            content = await response.read()
            if response.status != 200:
                raise SystemExit(f"status {response.status}: {content[:200]!r}")
        return content

    bodies = [body(request) for request in requests]
    timeout = aiohttp.ClientTimeout(total=3600)
    async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await one(session, body(WARM_UP))
        process = psutil.Process(server.pid)
        before, start, cpu = process.cpu_times(), time.perf_counter(), time.process_time()
        contents = await asyncio.gather(*[one(session, body) for body in bodies])
        seconds, client_cpu_s, after = time.perf_counter() - start, time.process_time() - cpu, process.cpu_times()
    answers = [read_answer(content, backend, streams) for content in contents]
    return {
        "seconds": seconds,
        "output_tokens": sum(tokens for _, tokens in answers),
        "texts_sha256": texts_sha256([text for text, _ in answers]),
        "client_cpu_s": client_cpu_s,
        "server_cpu_s": after.user + after.system - before.user - before.system,
    }


def run_served(asked: argparse.Namespace, requests: list[LoadRequest], backend: str, way: str) -> Run:
    """A server of its own, and all requests at it."""
    command = [sys.executable, "-m", "isologit", "serve", "--port", "0", *_model_options(asked)]
    with server_process([*command, "--speculative-tokens", "0"]) as server:
        return asyncio.run(over_http(server, requests, backend, way == "stream"))


def run_offline_apart(asked: argparse.Namespace) -> Run:
    """`run_offline` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving_overhead", "--offline", *_model_options(asked)]
    done = subprocess.run([*command, "--requests", str(asked.requests)], stdout=subprocess.PIPE, text=True, check=True)
    found: Run = json.loads(done.stdout.splitlines()[-1])
    return found


def _model_options(asked: argparse.Namespace) -> list[str]:
    options = ["--load-format", asked.load_format, "--max-num-seqs", str(asked.max_num_seqs)]
    options += ["--model", asked.model] if asked.model else []
    return options + (["--tokenizer", asked.tokenizer] if asked.tokenizer else [])


def summarise(case: Case, runs: list[Run], offline_runs: list[Run]) -> dict[str, Any]:
    """One case beside the offline runs; processor seconds are of server and client together."""
    over, base = (statistics.median(run["seconds"] for run in found) for found in (runs, offline_runs))
    cpu = statistics.median(run["server_cpu_s"] + run["client_cpu_s"] for run in runs)
    base_cpu = statistics.median(run["cpu_s"] for run in offline_runs)
    return {
        "backend": case[0],
        "way": case[1],
        "seconds": round(over, 3),
        "ratio": round(over / base, 4),
        "cpu_s": round(cpu, 3),
        "cpu_ratio": round(cpu / base_cpu, 4),
        "within_bar": over <= base * (1 + BAR),
        "equal_answers": len({(run["output_tokens"], run["texts_sha256"]) for run in runs + offline_runs}) == 1,
        "runs": runs,
    }


def table(result: Mapping[str, Any]) -> list[str]:
    """The medians in Markdown."""
    offline = result["offline"]
    lines = [
        "| | seconds | added | processor seconds | added |",
        "|---|---|---|---|---|",
        f"| offline | {offline['seconds']:.2f} | | {offline['cpu_s']:.1f} | |",
    ]
    for case in result["cases"]:
        time_added, cpu_added = (100 * (case[name] - 1) for name in ("ratio", "cpu_ratio"))
        name = f"{case['backend']}, {'streams' if case['way'] == 'stream' else 'whole answers'}"
        name += "" if case["equal_answers"] else ": other answers than offline, so NOT comparable"
        figures = f"{case['seconds']:.2f} | {time_added:+.1f} % | {case['cpu_s']:.1f} | {cpu_added:+.1f} %"
        lines.append(f"| {name} | {figures} |")
    return lines


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for isologit serve; the built-in demo model when left out")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--tokenizer")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--max-num-seqs", type=int, default=128, help="of both sides")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backends", nargs="+", default=sorted(WHOLE), choices=sorted(WHOLE))
    parser.add_argument("--ways", nargs="+", default=["whole", "stream"], choices=["whole", "stream"])
    parser.add_argument("--output", type=Path, help="result file; by default under benchmarks/results")
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.offline:
        print(json.dumps(run_offline(asked)), flush=True)
        os._exit(0)  # NOTE: native threads may still be leaving, and what they do at the end of Python is not measured
    requests = [
        LoadRequest(spec.id, spec.prompt, None, None, spec.max_new_tokens) for spec in builtin_requests(asked.requests)
    ]
    cases = [(backend, way) for backend in asked.backends for way in asked.ways]
    runs: dict[Case | None, list[Run]] = {case: [] for case in (None, *cases)}
    order = list(runs)  # None is offline
    for repeat in range(asked.repeats):
        turn = repeat % len(order)
        for case in order[turn:] + order[:turn]:
            runs[case].append(run_offline_apart(asked) if case is None else run_served(asked, requests, *case))
            name = "offline" if case is None else " ".join(case)
            print(f"{repeat + 1}/{asked.repeats} {name}: {runs[case][-1]['seconds']:.2f} s", flush=True)
    offline_runs = runs[None]
    result: dict[str, Any] = {
        "what": "the built-in requests offline, and all at once over HTTP",
        "model": asked.model or "built-in demo",
        "load_format": asked.load_format,
        "requests": asked.requests,
        "max_num_seqs": asked.max_num_seqs,
        "repeats": asked.repeats,
        "bar": 1 + BAR,
        "offline": {
            "seconds": round(statistics.median(run["seconds"] for run in offline_runs), 3),
            "cpu_s": round(statistics.median(run["cpu_s"] for run in offline_runs), 3),
            "runs": offline_runs,
        },
        "cases": [summarise(case, runs[case], offline_runs) for case in cases],
        "seed": 0,
        "note": "client and server share the machine's cores, so the client's own cost is included",
        "environment": describe_environment(),
        "server_versions": {name: version(name) for name in ("aiohttp", "fastapi", "uvicorn", "httptools")},
    }
    output = asked.output or RESULTS / f"serving-overhead-{asked.model or 'demo'}.json"
    write_json(output, result)
    print("\n".join(table(result)))
    print(output)


if __name__ == "__main__":
    main()
