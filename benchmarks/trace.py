"""Time the engine on the contest's length trace with random prompts, beside the machine's measured limits.

    python benchmarks/trace.py --model llama-110m --requests 300 --output benchmarks/results/NAME.json

The limit of a step is the larger of its products at the measured matrix-product rate and one pass over the weights at
the measured streaming rate; the steps are those the engine ran. Lengths are forced (`ignore_eos`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numba
import numpy as np
import torch

from isologit import LLM, GenerationRequest, SamplingParams
from isologit.config import load_model_config
from isologit.workload import contest_lengths


def product_rate(size: int = 2048, repeats: int = 7) -> float:
    """Median FLOP/s of a square float32 product through the library."""
    x, y = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(x, y)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(times))


def streaming_rate(megabytes: int = 400, repeats: int = 7) -> float:
    """Median bytes/s of a matrix-vector product over a matrix far larger than the caches."""
    matrix = torch.randn(megabytes * 2**20 // 4 // 1024, 1024)
    vector = torch.randn(1024)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        times.append(time.perf_counter() - start)
    return matrix.numel() * 4 / float(np.median(times))


def cpu_name() -> str:
    """Model name as the kernel reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-110m")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config = load_model_config(args.model)
    rng = np.random.default_rng(args.seed)
    requests = [
        GenerationRequest(
            str(i),
            [1, *rng.integers(3, config.vocab_size, prompt - 1).tolist()],
            SamplingParams(max_tokens=new, ignore_eos=True),
        )
        for i, (prompt, new) in enumerate(contest_lengths()[: args.requests])
    ]
    llm = LLM(
        args.model,
        load_format="dummy",
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        seed=args.seed,
    )
    llm.warm_up()
    head = 2 * config.hidden_size * config.vocab_size
    body = 2 * config.num_matmul_parameters - head
    runs = []
    for _ in range(args.repeats):
        flops, stream = product_rate(), streaming_rate()
        start = time.perf_counter()
        outputs = list(llm.run(requests))
        seconds = time.perf_counter() - start
        steps = llm.step_records
        limit = sum(
            max((body * s.num_tokens + head * s.num_logits) / flops, llm.describe()["weight_bytes"] / stream)
            for s in steps
        )
        plan = llm.last_plan
        assert plan is not None
        runs.append(
            {
                "seconds": seconds,
                "limit_s": limit,
                "limit_over_time": limit / seconds,
                "gflops_product": flops / 1e9,
                "gb_per_s_stream": stream / 1e9,
                "steps": len(steps),
                "predicted_steps": plan.predicted_steps,
                "predicted_s": plan.predicted_seconds,
                "host_share": 1 - sum(s.execute_s for s in steps) / sum(s.end_s - s.start_s for s in steps),
                "output_tokens": sum(len(o.token_ids) for o in outputs),
            }
        )
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "benchmark": "trace",
        "model": args.model,
        "requests": args.requests,
        "seed": args.seed,
        "median_s": float(np.median([run["seconds"] for run in runs])),
        "median_limit_over_time": float(np.median([run["limit_over_time"] for run in runs])),
        "engine": llm.describe(),
        "hardware": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numba": numba.__version__},
        "runs": runs,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
