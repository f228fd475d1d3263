"""What HTTP costs: the built-in requests offline, and the same requests sent all at once to a server.

    python -m benchmarks.serving_overhead
    python -m benchmarks.serving_overhead --model llama-110m --load-format dummy --tokenizer DIR --requests 300

Both sides run in processes of their own, interleaved, with the same options, and both clocks start after loading and
warming up: offline from the first request given to the engine to the last output, over HTTP from the first byte sent
to the last byte received. The client runs on the same cores as the server, so its own cost is part of what is
measured. On the built-in model a step takes about a millisecond, so HTTP weighs most there. Bar: 5 % added.
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
WHOLE = {"openai": "/v1/completions", "tgi": "/generate", "llm-serving": f"/models/{MODEL}/generate"}


def offline(asked: argparse.Namespace) -> dict[str, float]:
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


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for isologit serve; the built-in demo model when left out")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--tokenizer")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--max-num-seqs", type=int, default=128, help="of both sides")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="openai", choices=sorted(WHOLE))
    parser.add_argument("--stream", action="store_true", help="streams instead of whole answers")
    parser.add_argument("--output", type=Path, help="result file; by default under benchmarks/results")
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.offline:
        print(json.dumps(offline(asked)), flush=True)
        os._exit(0)  # NOTE: native threads may still be leaving, and what they do at the end of Python is not measured
    model_options = ["--load-format", asked.load_format]
    model_options += ["--model", asked.model] if asked.model else []
    model_options += ["--tokenizer", asked.tokenizer] if asked.tokenizer else []
    model_options += ["--max-num-seqs", str(asked.max_num_seqs)]
    again = [sys.executable, "-m", "benchmarks.serving_overhead", "--offline", *model_options]
    again += ["--requests", str(asked.requests)]
    requests = [
        LoadRequest(spec.id, spec.prompt, None, None, spec.max_new_tokens) for spec in builtin_requests(asked.requests)
    ]
    offline_runs: list[dict[str, float]] = []
    served_runs: list[dict[str, float]] = []
    for _ in range(asked.repeats):
        done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
        offline_runs.append(json.loads(done.stdout.splitlines()[-1]))
        serve = [sys.executable, "-m", "isologit", "serve", "--port", "0", *model_options, "--speculative-tokens", "0"]
        with server_process(serve) as server:
            url, process = server.url, psutil.Process(server.pid)
            before = process.cpu_times()
            served = asyncio.run(over_http(url, requests, asked.backend, asked.stream))
            after = process.cpu_times()
            served["server_cpu_s"] = after.user + after.system - before.user - before.system
            served_runs.append(served)
        print(f"offline {offline_runs[-1]}\nserved  {served_runs[-1]}", flush=True)
    counts = {run["output_tokens"] for run in offline_runs + served_runs}
    base = statistics.median(run["seconds"] for run in offline_runs)
    over = statistics.median(run["seconds"] for run in served_runs)
    result: dict[str, Any] = {
        "what": "the built-in requests offline, and all at once over HTTP",
        "model": asked.model or "built-in demo",
        "load_format": asked.load_format,
        "requests": asked.requests,
        "max_num_seqs": asked.max_num_seqs,
        "backend": asked.backend,
        "stream": asked.stream,
        "offline_s": round(base, 3),
        "served_s": round(over, 3),
        "ratio": round(over / base, 4),
        "bar": 1 + BAR,
        "within_bar": over <= base * (1 + BAR),
        "equal_output_tokens": len(counts) == 1,
        "offline_runs": offline_runs,
        "served_runs": served_runs,
        "seed": 0,
        "note": "client and server share the machine's cores, so the client's own cost is included",
        "environment": describe_environment(),
        "server_versions": {name: version(name) for name in ("aiohttp", "fastapi", "uvicorn", "httptools")},
    }
    way = "stream" if asked.stream else "whole"
    name = f"serving-overhead-{asked.model or 'demo'}-{asked.backend}-{way}.json"
    output = asked.output or RESULTS / name
    write_json(output, result)
    print(f"offline {base:.2f} s, served {over:.2f} s: {100 * (over / base - 1):+.1f} % (bar +{100 * BAR:.0f} %)")
    print(f"{output}")


if __name__ == "__main__":
    main()
