"""Time the CUDA backend's kernels and steps beside what the GPU was measured to do.

    python benchmarks/device_kernels.py --model llama2-7b --output DIR/kernels.json

Each kernel is timed over all layers of the model in one CUDA graph, so that weights come from memory and launches cost
nothing. With `TRITON_INTERPRET=1` nothing is timed; it only shows that the script runs (give it a tiny model).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from isologit.backends.base import LoadOptions
from isologit.backends.batch import FlatBatch
from isologit.backends.cuda.backend import CUDABackend
from isologit.backends.cuda.model import KVCache, Llama, Product, StepInputs
from isologit.backends.cuda.tiles import K_SPLITS, tile_for
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.common.files import write_json
from isologit.config import load_model_config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def seconds(launch: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a launch, by the device's own clock; CUDA graphs take launching out of it."""
    launch()
    if INTERPRETED:
        return 1.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(np.median(times))


def limits() -> dict[str, float]:
    """The library's float16 product and a copy within the device's memory, by a kernel or the copy engine."""
    size, items = (8192, 1 << 30) if not INTERPRETED else (64, 1 << 10)
    device = "cpu" if INTERPRETED else "cuda"
    a, b = (torch.randn(size, size, device=device).half() for _ in range(2))
    source = torch.zeros(items, device=device)
    target = torch.empty_like(source)
    copies: list[Callable[[], Any]] = [lambda: torch.neg(source, out=target), lambda: target.copy_(source)]
    found = {
        "float16_product_flops": 2 * size**3 / seconds(lambda: torch.mm(a, b)),
        "copy_bytes_per_s": 8 * items / min(map(seconds, copies)),
    }
    print(found, flush=True)
    return found


def run_products(model: Llama, products: list[Product], source: str, target: str, rows: int, splits: int) -> None:
    """A product of every layer."""
    for product in products:
        model._linear(source, product, target, rows, splits)


def run_attention(model: Llama, step: StepInputs, rows: int, cache: KVCache) -> None:
    """The attention of every layer, with the rotation before it."""
    for high, low in zip(cache.high, cache.low, strict=True):
        model._attention(step, rows, None, high, low)


def decode_batch(backend: CUDABackend, rows: int, context: int, num_blocks: int) -> FlatBatch:
    """Every row a sequence of its own with so long a context.

    Sequences share blocks where there are fewer than they need, as far apart as there are: what is timed is their way
    from memory, so those between must be more than the GPU's cache holds.
    """
    size, index = backend.block_size, np.arange(rows)
    blocks = -(-context // size)
    tables = (index[:, None] * blocks + np.arange(blocks)) % num_blocks
    position = np.full(rows, context - 1)
    return FlatBatch(
        token_ids=index % backend.config.vocab_size,
        positions=position,
        slots=tables[:, -1] * size + position % size,
        sequences=np.stack([index, np.ones_like(index), position], axis=1),
        block_tables=tables,
        table_rows=index,
        logits_rows=index,
        logits_wanted=np.zeros(rows, bool),
    )


def main() -> None:
    """Print as it goes; write after each number of rows, so that what is known stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 128, 256, 512, 1024])
    parser.add_argument("--contexts", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    measured = limits()
    config = load_model_config(args.model)
    backend = CUDABackend.load(dummy_checkpoint(config, dtype="float16"), LoadOptions(2048, os.cpu_count() or 1))
    needed = max(args.rows) * -(-max(args.contexts) // backend.block_size)
    num_blocks = min(needed, backend.free_memory() // 2 // backend.memory().kv_block)
    backend.allocate_kv(num_blocks)
    backend.reserve(max(args.rows))
    assert backend._cache is not None
    assert backend._cache.low is not None
    for layer in backend._cache.high:  # what was never written may be no number
        layer.normal_()
    backend._cache.low.view(torch.uint8).zero_()
    model, cache = backend._model, backend._cache
    kernels: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    result = {
        "benchmark": "device_kernels",
        "device": backend.describe()["device_name"],
        "model": args.model,
        "kv_blocks": num_blocks,
        "kv_blocks_without_sharing": needed,
        "measured_limits": measured,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "kernels": kernels,
        "steps": steps,
    }
    for rows in args.rows:
        for name, source, splits in (
            ("qkv", "normed", 1),
            ("out", "attended", K_SPLITS),
            ("gate_up", "normed", 1),
            ("down", "gated", K_SPLITS),
        ):
            products = [getattr(layer, name) for layer in model.layers]
            target = "parts" if splits > 1 else name

            each = seconds(partial(run_products, model, products, source, target, rows, splits)) / len(products)
            size = products[0].weight.numel()
            kernels.append(
                {
                    "kernel": name,
                    "rows": rows,
                    "tile": tile_for(rows, len(products[0].weight), splits, model._num_multiprocessors),
                    "us": each * 1e6,
                    "tflops": 4 * rows * size / each / 1e12,
                    "weight_gb_per_s": 2 * size / each / 1e9,
                    "limit_over_time": max(
                        4 * rows * size / measured["float16_product_flops"], 2 * size / measured["copy_bytes_per_s"]
                    )
                    / each,
                }
            )
            print(kernels[-1], flush=True)
        for context in args.contexts:
            batch = decode_batch(backend, rows, context, num_blocks)
            times = []
            for _ in range(6):
                start = time.perf_counter()
                backend.forward(batch).argmax  # noqa: B018 (waits)
                times.append(time.perf_counter() - start)
            attention = seconds(partial(run_attention, model, backend._step_inputs(rows), rows, cache))
            kv_bytes = rows * context * backend.memory().kv_block // backend.block_size
            steps.append(
                {
                    "rows": rows,
                    "context": context,
                    "step_ms": float(np.median(times[1:])) * 1e3,
                    "attention_ms": attention * 1e3,
                    "kv_gb_per_s": kv_bytes / attention / 1e9,
                    "products_ms": sum(k["us"] for k in kernels[-4:]) * len(model.layers) / 1e3,
                }
            )
            print(steps[-1], flush=True)
        write_json(args.output, result)


if __name__ == "__main__":
    main()
