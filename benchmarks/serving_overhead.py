"""What HTTP costs: the built-in requests offline, and the same requests sent all at once to a server, in every dialect.

    python -m benchmarks.serving_overhead
    python -m benchmarks.serving_overhead --model llama-110m --load-format dummy --tokenizer DIR --requests 200
    python -m benchmarks.serving_overhead --backends tgi --ways stream --repeats 5

Every case, offline or a dialect with whole answers or streams, runs once a repeat, in processes of its own and with the
same options. Repeats begin at another case each, so that a machine that slows down slows no case more than another.
Clocks start after loading and warming up: offline from the first request given to the engine to the last output, over
HTTP from the first byte sent to the last byte received. The client runs on the same cores as the server, so its own
cost is part of what is measured. On the built-in model a step takes about a millisecond, so HTTP weighs most there.
Bar: 5 % added.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from isologit.bench.dialects import DIALECTS, LoadRequest
from isologit.bench.streams import MessageStream
from isologit.common.environment import describe_environment
from isologit.common.files import write_json
from isologit.common.processes import server_process
from isologit.workload import builtin_requests

RESULTS = Path(__file__).parent / "results"
BAR = 0.05
MODEL = "llama2"
Case = tuple[str, str]  # dialect, and "whole" or "stream"
WHOLE = {"openai": "/v1/completions", "tgi": "/generate", "llm-serving": f"/models/{MODEL}/generate"}


def run_offline(asked: argparse.Namespace) -> dict[str, float]:
    """In this process: seconds, processor seconds, output tokens and steps."""
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
    requests = [
        GenerationRequest(spec.id, llm.tokenizer.encode(spec.prompt or ""), SamplingParams(spec.max_new_tokens))
        for spec in builtin_requests(asked.requests)
    ]
    llm.warm_up()
    start, cpu = time.perf_counter(), time.process_time()
    tokens = sum(len(output.token_ids) for output in llm.run(requests))
    found = {
        "seconds": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "output_tokens": tokens,
        "steps": len(llm.step_records),
    }
    llm.close()
    return found


async def over_http(url: str, requests: list[LoadRequest], backend: str, streams: bool) -> dict[str, float]:
    """All requests at once: seconds, output tokens as the server counts them, and this client's own processor time."""
    dialect = DIALECTS[backend]
    bodies = []
    for request in requests:
        body = dialect.body(request, MODEL, False)
        if not streams:
            body = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
        bodies.append(json.dumps(body).encode())
    path = dialect.endpoint.format(model=MODEL) if streams else WHOLE[backend]
    tokens = 0

    async def one(session: aiohttp.ClientSession, body: bytes) -> None:
        nonlocal tokens
        async with session.post(path, data=body, headers={"content-type": "application/json"}) as response:
            content = await response.read()
            if response.status != 200:
                raise SystemExit(f"status {response.status}: {content[:200]!r}")
        if streams:
            messages = MessageStream(dialect.read).feed(content)
            tokens += max(message.num_tokens or 0 for message in messages)
            return
        found = json.loads(content)
        if "usage" in found:
            tokens += found["usage"]["completion_tokens"]
        else:
            tokens += (found.get("details") or found)["generated_tokens"]

    timeout = aiohttp.ClientTimeout(total=3600)
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*[one(session, body) for body in bodies])
        return {
            "seconds": time.perf_counter() - start,
            "output_tokens": tokens,
            "client_cpu_s": time.process_time() - cpu,
        }


def run_served(asked: argparse.Namespace, requests: list[LoadRequest], backend: str, way: str) -> dict[str, float]:
    """A server of its own, and all requests at it; also the processor time that it took for them."""
    command = [sys.executable, "-m", "isologit", "serve", "--port", "0", *_model_options(asked)]
    with server_process([*command, "--speculative-tokens", "0"]) as server:
        process = psutil.Process(server.pid)
        before = process.cpu_times()
        found = asyncio.run(over_http(server.url, requests, backend, way == "stream"))
        after = process.cpu_times()
    return {**found, "server_cpu_s": after.user + after.system - before.user - before.system}


def run_offline_apart(asked: argparse.Namespace) -> dict[str, float]:
    """`run_offline` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving_overhead", "--offline", *_model_options(asked)]
    done = subprocess.run([*command, "--requests", str(asked.requests)], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _model_options(asked: argparse.Namespace) -> list[str]:
    options = ["--load-format", asked.load_format, "--max-num-seqs", str(asked.max_num_seqs)]
    options += ["--model", asked.model] if asked.model else []
    return options + (["--tokenizer", asked.tokenizer] if asked.tokenizer else [])


def summarise(case: Case, runs: list[dict[str, float]], offline_runs: list[dict[str, float]]) -> dict[str, Any]:
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
        "equal_output_tokens": len({run["output_tokens"] for run in runs + offline_runs}) == 1,
        "runs": runs,
    }


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
    runs: dict[Case | None, list[dict[str, float]]] = {case: [] for case in (None, *cases)}
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
    print(f"offline {result['offline']['seconds']:.2f} s, {result['offline']['cpu_s']:.2f} s of processor")
    for case in result["cases"]:
        time_added, cpu_added = (100 * (case[name] - 1) for name in ("ratio", "cpu_ratio"))
        differ = "" if case["equal_output_tokens"] else "; output tokens DIFFER from the offline run's"
        print(
            f"{case['backend']:<12} {case['way']:<7} {case['seconds']:.2f} s: {time_added:+.1f} % of time (bar "
            f"+{100 * BAR:.0f} %), {cpu_added:+.1f} % of processor{differ}"
        )
    print(output)


if __name__ == "__main__":
    main()
