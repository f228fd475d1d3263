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
from dataclasses import asdict
from pathlib import Path

import numba
import numpy as np
import torch

from isologit import LLM, GenerationRequest, SamplingParams
from isologit.common.files import write_json
from isologit.config import load_model_config
from isologit.job.machine import measure_limits
from isologit.job.profile import profile
from isologit.workload import contest_lengths


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
        speculative_config=None,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        seed=args.seed,
    )
    llm.warm_up()
    runs = []
    for _ in range(args.repeats):
        limits = measure_limits()
        start = time.perf_counter()
        outputs = list(llm.run(requests))
        seconds = time.perf_counter() - start
        plan = llm.last_plan
        assert plan is not None
        steps = [asdict(step) for step in llm.step_records]
        sizes = {name: llm.describe()[name] for name in ("weight_bytes", "step_bytes")}
        runs.append(
            {
                "run_s": seconds,
                "steps": len(steps),
                "predicted_steps": plan.predicted_steps,
                "predicted_s": plan.predicted_seconds,
                "output_tokens": sum(len(o.token_ids) for o in outputs),
                **profile(steps, llm.phase_seconds(), config, limits, **sizes),
            }
        )
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "benchmark": "trace",
        "model": args.model,
        "requests": args.requests,
        "seed": args.seed,
        "median_s": float(np.median([run["run_s"] for run in runs])),
        "median_limit_over_time": float(np.median([run["limit_over_time"] for run in runs])),
        "engine": llm.describe(),
        "hardware": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numba": numba.__version__},
        "runs": runs,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
