"""Where the time of a run's steps went, beside what the machine was measured to do. Computes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isologit.config import ModelConfig
from isologit.job.machine import MachineLimits

LAYER_PRODUCTS = ("qkv", "output", "gate_up", "down")
_NARROW_ROWS = 2  # steps of so few rows do little else than stream the weights


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

    steps: the records of one segment. phase_seconds: what the backend counted in it; "wait" is one thread's waiting for
    the part of another, and names that no part has are "other". weight_bytes: of all products.
    step_bytes: what a step reads of them, with the LM head's bytes where they stand for it. product_gflops leaves the
    LM head out, as most logits need not be computed. limit_over_time compares with the roofline of each step
    (Williams et al. 2009): the larger of its products, the whole LM head among them, at the library's rate and one
    pass over the weights at the streaming rate.
    """

    def total(name: str) -> float:
        return float(sum(step[name] for step in steps))

    busy = sum(step["end_s"] - step["start_s"] for step in steps)
    phases = dict(phase_seconds)
    in_layers = sum(phases.pop(name, 0.0) for name in LAYER_PRODUCTS)
    model = sum(phase_seconds.values())
    parts = {
        "products": in_layers + phases.pop("head", 0.0),
        "attention": phases.pop("attention", 0.0),
        "elementwise": phases.pop("elementwise", 0.0),
        "sampling": phases.pop("argmax", 0.0) + total("sample_s"),
        "waiting": phases.pop("wait", 0.0),
        "capture": total("capture_s"),
        "other": sum(phases.values()),
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
        "product_gflops": (sum(work) - last_flop) / in_layers / 1e9 if in_layers else None,
        "library_product_gflops": limits.flops / 1e9,
        "tile_gflops": limits.tile_flops / 1e9,
        "narrow_steps": len(narrow),
        "narrow_step_gb_per_s": step_bytes / float(np.median(narrow)) / 1e9 if narrow else None,
        "machine_gb_per_s": limits.bytes_per_s / 1e9,
        "limit_s": floor,
        "limit_over_time": floor / busy,
    }
