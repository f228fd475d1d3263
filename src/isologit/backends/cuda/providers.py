"""The Triton kernels as providers of `isologit.ops`; on a CPU under Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from isologit.backends.cuda import kernels
from isologit.backends.cuda.sizes import BLOCK_SIZE, padded
from isologit.backends.cuda.tiles import BLOCK_K

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=_DEVICE)


def _pair(x: Tensor) -> Tensor:
    """float32 [T, F] as a pair [2, T, F], both padded."""
    rows, features = x.shape
    pair = _zeros(2, padded(rows), padded(features), dtype=torch.float16)
    kernels.split_rows[(rows,)](
        x.contiguous().to(_DEVICE), pair, pair.stride(0), pair.shape[2], features,
        BLOCK=triton.next_power_of_2(features),
    )  # fmt: skip
    return pair


def _product(pair: Tensor, weight: Tensor, narrow: bool, scales: Tensor | None = None) -> Tensor:
    """A pair times a weight [out, in] that float16 holds, float64 [padded T, padded out]; two splits, added."""
    half = _zeros(padded(weight.shape[0]), padded(weight.shape[1]), dtype=torch.float16)
    half[: weight.shape[0], : weight.shape[1]] = weight
    out = _zeros(2, pair.shape[1], len(half))
    shape = pair.shape[1], len(half), pair.shape[2]
    constants = {
        "SCALED": scales is not None,
        "TERMS": 2,
        "K_SPLITS": 2,
        "BLOCK_N": 64,
        "BLOCK_K": BLOCK_K,
        "num_warps": 4,
    }
    factors = out if scales is None else scales
    if narrow:
        grid = (shape[0] // 16 * (shape[1] // 64), 2)
        kernels.linear_narrow[grid](pair, pair.stride(0), factors, half, out, *shape, BLOCK_M=16, **constants)
    else:
        pairs = TensorDescriptor.from_tensor(pair.view(-1, pair.shape[2]), [64, BLOCK_K])
        weights = TensorDescriptor.from_tensor(half, [64, BLOCK_K])
        grid = (shape[0] // 64 * (shape[1] // 64), 2)
        kernels.linear[grid](pairs, pair.shape[1], factors, weights, out, *shape, BLOCK_M=64, **constants)
    return out.double().sum(0)


def _linear(x: Tensor, weight: Tensor, narrow: bool = False) -> Tensor:
    return _product(_pair(x), weight, narrow)[: len(x), : len(weight)].float().cpu()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """With tiles of many rows."""
    return _linear(x, weight)


def linear_narrow(x: Tensor, weight: Tensor) -> Tensor:
    """With tiles of few rows."""
    return _linear(x, weight, narrow=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the last norm of a model: rows taken by index, the residual being the sum of two parts of a product."""
    rows, width = x.shape
    index = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=_DEVICE)
    source = x.flip(0).contiguous().to(_DEVICE)
    parts, pair = torch.stack([source / 4, source / 4]), _zeros(2, rows, padded(width), dtype=torch.float16)
    final = _zeros(rows, width)
    kernels.add_norm[(rows,)](
        source / 2, parts, parts.stride(0), width, None, weight.contiguous().to(_DEVICE), pair, pair.stride(0),
        pair.shape[2], index, final, width, eps, NUM_PARTS=2, HAS_BIAS=False, INDEX="final",
        BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return final.cpu()


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The product, then silu and its scale; a weight that float16 does not hold goes in as two."""
    rows, width = len(x), padded(len(gate))
    pair = _pair(x)
    gate_up = _zeros(rows, 2 * width, dtype=torch.float64)
    for i, weight in enumerate((gate, up)):
        high = weight.half()
        columns = slice(i * width, i * width + width)
        for part in (high, (weight - high.float()).half()):
            gate_up[:, columns] += _product(pair, part, narrow=False)[:rows]
    gated, scales = _zeros(2, rows, width, dtype=torch.float16), _zeros(rows)
    kernels.silu_mul[(rows,)](
        gate_up.float(), width, None, gated, gated.stride(0), width, scales, len(gate),
        HAS_BIAS=False, BLOCK=triton.next_power_of_2(len(gate)),
    )  # fmt: skip
    return (gated.float().sum(0) * scales[:, None])[:, : len(gate)].cpu()


def paged_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The sequence through scattered blocks, keys and values as two float16 terms; unwritten memory is NaN."""
    return attention_with(torch.float16, q, k, v, cos, sin)


def attention_with(low: torch.dtype, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`paged_attention` with the low terms of keys and values in this dtype."""
    (length, heads, dim), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    num_blocks = triton.cdiv(length, BLOCK_SIZE)
    table = torch.arange(num_blocks, 0, -1, dtype=torch.int32, device=_DEVICE)
    positions = torch.arange(length, dtype=torch.int32, device=_DEVICE)
    slots = table[positions.long() // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    high = torch.full((num_blocks + 1, 2, kv_heads, BLOCK_SIZE, dim), math.nan, dtype=torch.float16, device=_DEVICE)
    lows = torch.full_like(high, math.nan, dtype=low)
    qkv = torch.cat([part.flatten(1) for part in (q, k, v)], 1).contiguous().to(_DEVICE)
    queries = _zeros(2, length, heads, dim, dtype=torch.float16)
    sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": dim, "BLOCK_SIZE": BLOCK_SIZE, "KV_TERMS": 2}
    kernels.rotate_and_cache[(length, triton.cdiv(heads + 2 * kv_heads, 4))](
        qkv, qkv.shape[1], None, cos.contiguous().to(_DEVICE), sin.contiguous().to(_DEVICE), positions, slots, queries,
        queries.stride(0), high, lows, 1 / math.sqrt(dim), **sizes, HAS_BIAS=False, BLOCK_HEADS=4,
        HALF=triton.next_power_of_2(dim // 2),
    )  # fmt: skip
    step = max(1, 16 // group)
    first = torch.arange(0, length, step, dtype=torch.int32, device=_DEVICE)
    tiles = torch.stack([first, (length - first).clamp_max(step), first, torch.zeros_like(first)], 1).contiguous()
    counts = torch.tensor([len(first), num_blocks], dtype=torch.int32, device=_DEVICE)
    out = _zeros(2, length, heads * dim, dtype=torch.float16)
    kernels.attention[(len(first), kv_heads)](
        queries, queries.stride(0), high, lows, tiles, counts[:1], table, counts[1:], out, out.stride(0), heads * dim,
        **sizes, BLOCK_M=max(16, triton.next_power_of_2(group)), BLOCK_N=16,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), num_warps=1,
    )  # fmt: skip
    return out.float().sum(0).view(length, heads, dim).cpu()


def argmax(logits: Tensor) -> Tensor:
    """A row a program, in blocks, so that a tie may lie across two of them."""
    out = _zeros(len(logits), dtype=torch.int32)
    rows = logits.contiguous().to(_DEVICE)
    kernels.argmax[(len(rows),)](rows, rows.shape[1], rows.shape[1], out, BLOCK=128)
    return out.cpu()


def log_normaliser(logits: Tensor) -> Tensor:
    """Plain torch, on the device."""
    return logits.to(_DEVICE).double().logsumexp(-1).cpu()


PROVIDERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "linear": {"triton": linear, "triton-narrow": linear_narrow},
    "rms_norm": {"triton": rms_norm},
    "swiglu": {"triton": swiglu},
    "paged_attention": {"triton": paged_attention},
    "log_normaliser": {"torch": log_normaliser},
    "argmax": {"triton": argmax},
}
