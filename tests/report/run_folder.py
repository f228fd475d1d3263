"""A run's output folder with the files that the job writes, of any size, without running anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def result(n: int) -> dict[str, Any]:
    return {
        "format_version": 1,
        "isologit_version": "0.1.0",
        "mode": "generate",
        "seed": 0,
        "started_at": "2026-01-05T09:30:00+00:00",
        "model": {"name": "demo", "kind": "huggingface", "dtype": "float16", "num_parameters": 3_900_000},
        "dataset": {"name": "built-in prompts", "limit": n},
        "totals": {
            "inference_s": 41.7,
            "completed": n - 1,
            "failed": 1,
            "prompt_tokens": 31425,
            "output_tokens": 98086,
        },
        "stages": {"preprocess_s": 0.4, "inference_s": 41.7, "postprocess_s": 0.9, "baseline_s": 20.0},
        "baseline": {"requests": 24, "seconds": 20.0, "engine_s": 0.71, "speedup": 28.2},
        "engine": {"kernels": "numba", "compute_dtype": "float32", "max_num_seqs": 193, "num_threads": 2},
        "environment": {"cpu": "two cores", "python": "3.11.7", "versions": {"torch": "2.13.0", "numpy": "2.4.6"}},
        "hashes": {"weights": "a" * 64, "prompts": "b" * 64, "config": "c" * 64, "code": "d" * 64},
    }


def certificate(rng: np.random.Generator) -> dict[str, Any]:
    edges = np.concatenate([[0.0], np.geomspace(1e-8, 1.0, 65)])
    delta = np.abs(rng.normal(0, 3e-6, 200_000)) * np.exp(rng.normal(0, 1, 200_000))
    counts = np.histogram(delta, edges)[0]
    logit = np.abs(rng.normal(0, 4, 1500))
    return {
        "verdict": "VALID",
        "reasons": [],
        "tolerance": {"atol": 5e-3, "rtol": 0.0},
        "captured": {
            "rows": 96,
            "max_abs": float(delta.max()),
            "mean_abs": float(delta.mean()),
            "p99_abs": float(np.quantile(delta, 0.99)),
            "over_tolerance": 0,
            "top1_agreement": 1.0,
            "kl_max": 3.1e-11,
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "scatter": np.stack([logit, delta[:1500]], axis=1).tolist(),
        },
        "greedy": {
            "tokens": 98086,
            "agreed": 98084,
            "divergences": [
                {"request_id": "17", "position": 40, "ours": 12, "theirs": 88, "margin": 2.2e-6, "tie": True},
                {"request_id": "311", "position": 3, "ours": 9, "theirs": 10, "margin": 1.1e-6, "tie": True},
            ],
        },
        "noise_floor": {"max_abs": 2.4e-5, "rows": 64},
    }


def outputs(n: int, rng: np.random.Generator, *, prompt: str, text: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    clock = 0.0
    for i in range(n - 1):
        scheduled = max(0.0, clock - 9)
        clock += float(rng.exponential(40.0 / n))
        first = scheduled + 0.25
        lines.append(
            {
                "id": str(i),
                "prompt": prompt,
                "text": text,
                "prompt_token_ids": list(range(20)),
                "token_ids": list(range(65)),
                "finish_reason": "length" if i % 7 else "stop",
                "error": None,
                "metrics": {
                    "arrival_s": 0.0,
                    "scheduled_s": scheduled,
                    "first_token_s": first,
                    "finished_s": first + float(rng.exponential(4)),
                },
            }
        )
    lines.append({"id": "bad", "prompt": prompt, "error": "line 7: the prompt is longer than the model's context"})
    return lines


def steps(n: int) -> list[dict[str, Any]]:
    return [
        {
            "start_s": i * 41.0 / n,
            "end_s": (i + 0.97) * 41.0 / n,
            "num_seqs": max(1, round(193 * (1 - (i / n) ** 3))),
            "num_tokens": max(1, round(193 * (1 - (i / n) ** 3))) + (300 if i < n // 10 else 0),
        }
        for i in range(n)
    ]


def write_folder(
    folder: Path,
    *,
    n: int = 12,
    num_steps: int = 40,
    prompt: str = "Name three rivers.",
    text: str = "Nile, Po, Rhine.",
) -> Path:
    """A complete folder of `n` requests, the last of which failed."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", result(n))
    write_json(folder / "certificate.json", certificate(rng))
    write_lines(folder / "outputs.jsonl", outputs(n, rng, prompt=prompt, text=text))
    write_lines(folder / "steps.jsonl", steps(num_steps))
    return folder


def write_json(path: Path, thing: dict[str, Any]) -> None:
    path.write_text(json.dumps(thing), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
