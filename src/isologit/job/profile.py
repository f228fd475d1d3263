"""Where the time of a run's steps went, beside what the machine was measured to do. Computes; measures two rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from isologit.config import ModelConfig

LAYER_PRODUCTS = ("qkv", "output", "gate_up", "down")
_NARROW_ROWS = 2  # steps of so few rows do little else than stream the weights


@dataclass(frozen=True)
class MachineLimits:
    """FLOP/s of a float32 matrix product of the library, bytes/s of one pass over memory larger than the caches."""

    flops: float
    bytes_per_s: float


def measure_limits() -> MachineLimits:
    """Measure both rates with torch, on as many threads as it has (about two seconds)."""
    return MachineLimits(product_rate(), streaming_rate())


def product_rate(size: int = 2048, repeats: int = 7) -> float:
    """Median FLOP/s of a square float32 product."""
    x, y = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(x, y), repeats)


def streaming_rate(megabytes: int = 400, repeats: int = 7) -> float:
    """Median bytes/s of reading memory far larger than the caches, in a dot product of its halves.

    A matrix-vector product of the library reads at half that rate on some machines.
    """
    half = megabytes * 2**20 // 8
    first, second = torch.randn(half), torch.randn(half)
    return 8 * half / _median_seconds(lambda: torch.dot(first, second), repeats)


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def profile(
    steps: Sequence[Mapping[str, Any]],
    phase_seconds: Mapping[str, float],
    config: ModelConfig,
    limits: MachineLimits,
    *,
    weight_bytes: int,
    step_bytes: int,
) -> dict[str, Any]:
    """Shares of the steps' time (they sum to 1), achieved rates, and the limits.

    steps: the records of one segment. phase_seconds: what the model booked in it. weight_bytes: of all products.
    step_bytes: what a step reads of them, with the bytes that may stand for the last one. product_gflops leaves the
    last product out, as most logits need not be computed. limit_over_time compares with the roofline of each step
    (Williams et al. 2009): the larger of its products, the whole last one among them, at the product rate and one pass
    over the weights at the streaming rate.
    """

    def total(name: str) -> float:
        return float(sum(step[name] for step in steps))

    busy = sum(step["end_s"] - step["start_s"] for step in steps)
    in_layers = sum(phase_seconds[name] for name in LAYER_PRODUCTS)
    model = sum(phase_seconds.values())
    parts = {
        "products": in_layers + phase_seconds["head"],
        "attention": phase_seconds["attention"],
        "elementwise": phase_seconds["elementwise"],
        "sampling": phase_seconds["argmax"] + total("sample_s"),
        "capture": total("capture_s"),
    }
    parts["scheduler"] = busy - model - total("sample_s") - parts["capture"]
    work = [config.product_flop(step["num_tokens"], step["num_logits"]) for step in steps]
    floor = sum(max(flop / limits.flops, weight_bytes / limits.bytes_per_s) for flop in work)
    last_flop = 2 * config.hidden_size * config.vocab_size * sum(step["num_logits"] for step in steps)
    narrow = [step["execute_s"] for step in steps if step["num_tokens"] <= _NARROW_ROWS]
    return {
        "seconds": parts,
        "shares": {name: seconds / busy for name, seconds in parts.items()},
        "host_share": (busy - model) / busy,
        "product_gflops": (sum(work) - last_flop) / in_layers / 1e9,
        "machine_product_gflops": limits.flops / 1e9,
        "narrow_steps": len(narrow),
        "narrow_step_gb_per_s": step_bytes / float(np.median(narrow)) / 1e9 if narrow else None,
        "machine_gb_per_s": limits.bytes_per_s / 1e9,
        "limit_s": floor,
        "limit_over_time": floor / busy,
    }
