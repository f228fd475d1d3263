"""Where the CUDA backend's difference from float32 comes from: one part at a time is replaced by a float32 one.

    python benchmarks/device_errors.py --model llama2-7b --output DIR/errors.json

One prompt, all its logits, beside the plain torch backend in float32 on the same device. With `TRITON_INTERPRET=1` it
runs on a CPU, where products and sums are float32's and only what is kept in 16 bits shows.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isologit.backends.base import LoadOptions
from isologit.backends.batch import FlatBatch
from isologit.backends.cuda.backend import CUDABackend
from isologit.backends.cuda.model import KVCache, Llama, Product
from isologit.backends.torch.backend import TorchBackend
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.common.files import write_json
from isologit.config import load_model_config

MATRICES = ("qkv", "out", "gate_up", "down", "head")
_on_tensor_cores = Llama._linear


def linears(exact: set[str], high_only: bool = False) -> Callable[..., None]:
    """`Llama._linear` with these matrices' products in float32, or all without the low term of activations."""

    def linear(
        model: Llama, source: str, product: Product, out: str, rows: int, k_splits: int = 1, *, scaled: bool = False
    ) -> None:
        name = {"qkv": "qkv", "gate_up": "gate_up", "logits": "head"}.get(
            out, "out" if source == "attended" else "down"
        )
        pair = model.buffers[source]
        if high_only:
            low = pair[1].clone()
            pair[1].zero_()
            _on_tensor_cores(model, source, product, out, rows, k_splits, scaled=scaled)
            pair[1] = low
        elif name not in exact:
            _on_tensor_cores(model, source, product, out, rows, k_splits, scaled=scaled)
        else:
            result = pair[:, :rows].float().sum(0) @ product.weight.float().T
            if scaled:
                result *= model.buffers["scales"][:rows, None]
            parts = model.buffers[out].view(-1)[: k_splits * result.numel()].view(k_splits, *result.shape)
            parts.zero_()
            parts[0] = result

    return linear


def one_prompt(tokens: np.ndarray, block_size: int) -> FlatBatch:
    """All logits of one sequence in one step."""
    count = len(tokens)
    positions = np.arange(count)
    return FlatBatch(
        token_ids=tokens,
        positions=positions,
        slots=positions,
        sequences=np.array([[0, count, 0]]),
        block_tables=np.arange(-(-count // block_size))[None],
        table_rows=np.array([0]),
        logits_rows=positions,
        logits_wanted=np.ones(count, bool),
    )


def main() -> None:
    """Print a table and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    config = load_model_config(args.model)
    checkpoint = dummy_checkpoint(config, dtype="float16")
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    options = LoadOptions(args.tokens, os.cpu_count() or 1, device)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, args.tokens)
    backend = CUDABackend.load(checkpoint, options)
    backend.allocate_kv(-(-args.tokens // backend.block_size))
    batch = one_prompt(tokens, backend.block_size)
    found: dict[str, np.ndarray] = {"as it is": backend.forward(batch).logits.copy()}
    backend._graphs.clear()  # from here on kernel by kernel, so that parts can be replaced
    found["without graphs"] = backend.forward(batch).logits.copy()
    assert backend._cache is not None
    kept = backend._cache
    wide = torch.empty(kept.high.shape, dtype=torch.float16, device=kept.high.device)
    backend._cache = KVCache(kept.high, wide)
    found["keys and values as two float16 terms"] = backend.forward(batch).logits.copy()
    backend._cache = kept
    replaced: dict[str, Any] = {
        "all products in float32": linears(set(MATRICES)),
        **{f"only {name} on tensor cores": linears(set(MATRICES) - {name}) for name in MATRICES},
        "activations in one float16 term": linears(set(), high_only=True),
    }
    for name, linear in replaced.items():
        Llama._linear = linear  # type: ignore[method-assign]
        found[name] = backend.forward(batch).logits.copy()
    Llama._linear = _on_tensor_cores  # type: ignore[method-assign]
    described = backend.describe()
    backend.close()
    del backend, kept, wide
    plain = TorchBackend.load(checkpoint, options)
    plain.allocate_kv(-(-args.tokens // plain.block_size))
    want = plain.forward(one_prompt(tokens, plain.block_size)).logits
    rows = []
    for name, logits in found.items():
        difference = np.abs(logits.astype(np.float64) - want)
        rows.append(
            {
                "what": name,
                "max_abs": float(difference.max()),
                "rms": float(np.sqrt(np.square(difference).mean())),
                "same_argmax": int((logits.argmax(1) == want.argmax(1)).sum()),
            }
        )
        print(f"{name:45s} max {rows[-1]['max_abs']:.2e} rms {rows[-1]['rms']:.2e}", flush=True)
    write_json(
        args.output,
        {
            "benchmark": "device_errors",
            "device": described["device_name"],
            "model": args.model,
            "tokens": args.tokens,
            "largest_logit": float(np.abs(want).max()),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
