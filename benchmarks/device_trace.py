"""The contest's length trace on a device: this engine, and transformers in float16 batches beside it.

    python benchmarks/device_trace.py --model llama2-7b --output DIR/trace.json --dataset DIR/trace.jsonl

Prompts are random tokens of the trace's lengths, outputs are as long as the trace says (`ignore_eos`). transformers
runs a sample of `--transformers-seconds`: requests sorted by output length, in padded batches, greedy. A batch takes as
many steps as its longest output, so its time for all is extrapolated by steps, and named so. `--dataset` writes the
same requests for `isologit run`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isologit import LLM, GenerationRequest, SamplingParams
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.common.files import write_json
from isologit.config import ModelConfig, load_model_config
from isologit.fidelity.outside import load_llama
from isologit.workload import contest_lengths


def make_requests(config: ModelConfig, count: int, seed: int, shorten: int) -> list[GenerationRequest]:
    """The first requests of the trace; lengths divided by `shorten` for a dry run."""
    rng = np.random.default_rng(seed)
    return [
        GenerationRequest(
            str(i),
            [1, *rng.integers(3, config.vocab_size, prompt // shorten).tolist()][:prompt],
            SamplingParams(max_tokens=max(1, new // shorten), ignore_eos=True),
        )
        for i, (prompt, new) in enumerate(contest_lengths()[:count])
    ]


def run_engine(args: argparse.Namespace, requests: list[GenerationRequest]) -> dict[str, Any]:
    """Repeats of the whole trace, and that the texts are the same each time."""
    start = time.perf_counter()
    llm = LLM(
        args.model,
        load_format="dummy",
        backend=args.backend,
        device=args.device,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        speculative_config=None,
    )
    loaded = time.perf_counter()
    llm.warm_up()
    warm = time.perf_counter()
    runs, texts = [], []
    for _ in range(args.repeats):
        start_run = time.perf_counter()
        outputs = {output.request_id: output.token_ids for output in llm.run(requests)}
        took = time.perf_counter() - start_run
        steps = [asdict(step) for step in llm.step_records]
        parts = ("schedule_s", "execute_s", "sample_s", "capture_s")
        runs.append(
            {
                "seconds": took,
                "steps": len(steps),
                "tokens": sum(step["num_tokens"] for step in steps),
                **{part: sum(step[part] for step in steps) for part in parts},
            }
        )
        texts.append(outputs)
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "load_s": loaded - start,
        "warm_up_s": warm - loaded,
        "runs": runs,
        "median_s": float(np.median([run["seconds"] for run in runs])),
        "output_tokens": sum(map(len, texts[0].values())),
        "same_texts_each_time": all(text == texts[0] for text in texts),
        "engine": llm.describe(),
    }
    llm.close()
    gc.collect()
    return result


def run_transformers(
    args: argparse.Namespace, requests: list[GenerationRequest], on_batch: Callable[[dict[str, Any]], None]
) -> None:
    """A sample in padded batches of `generate`, float16; `on_batch` is told after each what is known by then.

    Batches are spread evenly over the lengths, the shortest first, so that one cut off by the budget is the longest.
    The shortest of all warms up and does not count.
    """
    checkpoint = dummy_checkpoint(load_model_config(args.model), dtype="float16")
    dtype = torch.float16 if args.device != "cpu" else torch.float32
    model = load_llama(checkpoint, dtype)[0].to(args.device).eval()
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    ordered = sorted(requests, key=lambda request: -request.params.max_tokens)
    batches = [ordered[first : first + args.batch] for first in range(0, len(ordered), args.batch)][::-1]
    all_steps = sum(batch[0].params.max_tokens for batch in batches)
    sampled: list[dict[str, Any]] = []
    left = args.transformers_seconds
    numbers = np.linspace(0, len(batches) - 1, args.sample_batches + 1).astype(int).tolist()
    for number in numbers:
        if left <= 0:
            break
        batch = batches[number]
        longest = max(len(request.prompt_token_ids) for request in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
            mask[row, longest - len(request.prompt_token_ids) :] = 1
        wanted = batch[0].params.max_tokens
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids.to(args.device), attention_mask=mask.to(args.device), max_new_tokens=wanted, do_sample=False,
                pad_token_id=0, max_time=left,
            )  # fmt: skip
        if args.device != "cpu":
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        left -= took
        found = {"requests": len(batch), "steps": out.shape[1] - longest, "steps_wanted": wanted, "seconds": took}
        print(f"transformers: {found}", flush=True)
        if number != numbers[0]:
            sampled.append(found)
        seconds, steps = (sum(batch[name] for batch in sampled) for name in ("seconds", "steps"))
        on_batch(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "batch": args.batch,
                "budget_s": args.transformers_seconds,
                "sampled": sampled,
                "steps_of_all_batches": all_steps,
                "extrapolated_s": seconds / steps * all_steps if steps else None,
                "extrapolation": "seconds a step of the sampled batches, times the steps of all batches",
            }
        )


def main() -> None:
    """Write after each part, so that what is known stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sample-batches", type=int, default=4)
    parser.add_argument("--transformers-seconds", type=float, default=40.0)
    parser.add_argument("--shorten", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    config = load_model_config(args.model)
    requests = make_requests(config, args.requests, args.seed, args.shorten)
    if args.dataset:
        lines = [
            {"id": r.request_id, "prompt_token_ids": r.prompt_token_ids, "max_new_tokens": r.params.max_tokens}
            for r in requests
        ]
        args.dataset.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result: dict[str, Any] = {"benchmark": "device_trace", "model": args.model, "requests": len(requests)}
    result["isologit"] = run_engine(args, requests)
    write_json(args.output, result)

    def keep(sample: dict[str, Any]) -> None:
        result["transformers"] = sample
        write_json(args.output, result)

    run_transformers(args, requests, keep)
    print(json.dumps({name: result.get(name) for name in ("isologit", "transformers")}, indent=1))


if __name__ == "__main__":
    main()
