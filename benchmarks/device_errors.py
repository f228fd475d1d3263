"""Where the CUDA backend's difference from float32 comes from: one part at a time is replaced by a float32 one.

    python benchmarks/device_errors.py --model llama2-7b --output DIR/errors.json

One prompt, all its logits, beside the plain torch backend in float32 on the same device: products in float32, products
in more partial sums than the backend takes, and attention in float32 with keys and values rounded or not. With
`TRITON_INTERPRET=1` it runs on a CPU, where products and sums are float32's and only what is kept in 16 bits shows.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isologit.backends.base import LoadOptions
from isologit.backends.batch import FlatBatch
from isologit.backends.cuda.backend import CUDABackend
from isologit.backends.cuda.model import KVCache, Llama, Product, StepInputs
from isologit.backends.torch.backend import TorchBackend
from isologit.backends.torch.model import rotate
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.common.files import write_json
from isologit.config import load_model_config

MATRICES = ("qkv", "out", "gate_up", "down", "head")
_linear, _attention = Llama._linear, Llama._attention
_SHORT = {**dict.fromkeys(MATRICES, 4), "down": 8}  # partial sums of 1024 to 1408 terms in llama2-7b
_LOW_SCALE, _E4M3_MAX = 16384.0, 448.0  # as the kernels keep what float16 leaves of keys and values


def name_of(source: str, out: str) -> str:
    """Which matrix a product from `source` into `out` is of."""
    return {"qkv": "qkv", "gate_up": "gate_up", "logits": "head"}.get(out, "out" if source == "attended" else "down")


def linears(exact: Collection[str], high_only: bool = False) -> Callable[..., None]:
    """`Llama._linear` with these matrices' products in float32, or all without the low term of activations."""

    def linear(
        model: Llama, source: str, product: Product, out: str, rows: int, k_splits: int = 1, *, scaled: bool = False
    ) -> None:
        pair = model.buffers[source]
        if high_only:
            low = pair[1].clone()
            pair[1].zero_()
            _linear(model, source, product, out, rows, k_splits, scaled=scaled)
            pair[1] = low
        elif name_of(source, out) not in exact:
            _linear(model, source, product, out, rows, k_splits, scaled=scaled)
        else:
            result = pair[:, :rows].float().sum(0) @ product.weight.float().T
            if scaled:
                result *= model.buffers["scales"][:rows, None]
            _keep(model, out, k_splits, result)

    return linear


def partial_sums(splits: Mapping[str, int]) -> Callable[..., None]:
    """`Llama._linear` with the products of these matrices in so many partial sums, which float32 adds up."""

    def linear(
        model: Llama, source: str, product: Product, out: str, rows: int, k_splits: int = 1, *, scaled: bool = False
    ) -> None:
        count = splits.get(name_of(source, out))
        if count is None:
            _linear(model, source, product, out, rows, k_splits, scaled=scaled)
            return
        parts = torch.zeros(count, rows, len(product.weight), device=model.device)
        model.buffers["partial sums"] = parts
        _linear(model, source, product, "partial sums", rows, count, scaled=scaled)
        _keep(model, out, k_splits, parts.sum(0))

    return linear


def _keep(model: Llama, out: str, k_splits: int, result: torch.Tensor) -> None:
    """A whole product where its parts are expected."""
    parts = model.buffers[out].view(-1)[: k_splits * result.numel()].view(k_splits, *result.shape)
    parts.zero_()
    parts[0] = result


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """As it comes back from the cache: a float16 term, and an FP8 one for what that leaves."""
    high = x.half().float()
    low = ((x - high) * _LOW_SCALE).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()
    return high + low / _LOW_SCALE


def plain_attention(rounded: Collection[str]) -> Callable[..., None]:
    """`Llama._attention` of one prompt in float32; "keys" or "values" in `rounded` are as the cache keeps them."""

    def attention(model: Llama, step: StepInputs, rows: int, bias: torch.Tensor | None, *_: torch.Tensor) -> None:
        c = model.config
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv = model.buffers["qkv"][:rows] + (0 if bias is None else bias)
        q, k, v = (
            part.reshape(rows, -1, dim)
            for part in qkv[:, : (heads + 2 * kv_heads) * dim].split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
        )
        where = step.positions[:rows].long()
        q, k = (rotate(x, model.cos[where], model.sin[where]) for x in (q, k))
        k, v = (_rounded(x) if name in rounded else x for name, x in (("keys", k), ("values", v)))
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim)
        unseen = torch.ones(rows, rows, device=q.device).triu(1).bool()  # rows that pad the step come last
        weights = scores.masked_fill(unseen, -math.inf).softmax(-1)
        result = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
        high, low = model.buffers["attended"][:, :rows, : heads * dim]
        high.copy_(result)
        low.copy_(result - high.float())

    return attention


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
    """Print a table and write a JSON file, row by row, so that what is known stays."""
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
    plain = TorchBackend.load(checkpoint, options)
    plain.allocate_kv(-(-args.tokens // plain.block_size))
    want = plain.forward(one_prompt(tokens, plain.block_size)).logits
    plain.close()
    del plain
    backend = CUDABackend.load(checkpoint, options)
    backend.allocate_kv(-(-args.tokens // backend.block_size))
    batch = one_prompt(tokens, backend.block_size)
    rows: list[dict[str, Any]] = []
    result = {
        "benchmark": "device_errors",
        "device": backend.describe()["device_name"],
        "model": args.model,
        "tokens": args.tokens,
        "largest_logit": float(np.abs(want).max()),
        "rows": rows,
    }

    def compare(name: str) -> None:
        logits = backend.forward(batch).logits
        difference = np.abs(logits.astype(np.float64) - want)
        rows.append(
            {
                "what": name,
                "max_abs": float(difference.max()),
                "rms": float(np.sqrt(np.square(difference).mean())),
                "same_argmax": int((logits.argmax(1) == want.argmax(1)).sum()),
            }
        )
        print(f"{name:65s} max {rows[-1]['max_abs']:.2e} rms {rows[-1]['rms']:.2e}", flush=True)
        write_json(args.output, result)

    compare("as it is")
    backend._graphs.clear()  # from here on kernel by kernel, so that parts can be replaced
    compare("without graphs")
    assert backend._cache is not None
    kept = backend._cache
    exact = linears(MATRICES)
    backend._cache = KVCache(kept.high, torch.empty(kept.high.shape, dtype=torch.float16, device=kept.high.device))
    compare("keys and values as two float16 terms")
    Llama._linear = exact  # type: ignore[method-assign]
    compare("all products in float32, keys and values as two float16 terms")
    backend._cache = kept
    replaced: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
        "all products in float32": (exact, _attention),
        **{f"only {name} on tensor cores": (linears(set(MATRICES) - {name}), _attention) for name in MATRICES},
        "activations in one float16 term": (linears(set(), high_only=True), _attention),
        # Of what is left with all products in float32: attention's own sums, and what is kept of keys and values.
        "all products and attention in float32": (exact, plain_attention(())),
        "the same, keys rounded": (exact, plain_attention(("keys",))),
        "the same, values rounded": (exact, plain_attention(("values",))),
        "the same, keys and values rounded": (exact, plain_attention(("keys", "values"))),
        "only attention in float32, keys and values rounded": (_linear, plain_attention(("keys", "values"))),
        # Whether shorter sums on tensor cores lose less.
        **{f"qkv in {n} partial sums": (partial_sums({"qkv": n}), _attention) for n in (2, 4, 8)},
        "qkv, gate and up in 4 partial sums": (partial_sums({"qkv": 4, "gate_up": 4}), _attention),
        "all products in 4 partial sums, down in 8": (partial_sums(_SHORT), _attention),
        "all products in 16 partial sums, down in 32": (
            partial_sums({name: 4 * n for name, n in _SHORT.items()}),
            _attention,
        ),
    }
    for name, (linear, attention) in replaced.items():
        Llama._linear, Llama._attention = linear, attention  # type: ignore[method-assign]
        compare(name)
    Llama._linear, Llama._attention = _linear, _attention  # type: ignore[method-assign]
    backend.close()


if __name__ == "__main__":
    main()
