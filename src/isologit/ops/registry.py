"""Every numeric operation once: what it means, inputs to try it on, how close providers must come, and who provides it.

The reference definition is plain torch in float64; a provider is a function of the same arguments. One parametrised
test walks this registry, so a new provider is checked by being listed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from isologit.ops import cpu
from isologit.ops.simd import PANEL_WIDTH, TILE_ROWS, VECTOR_WIDTH

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """One operation: `reference(**inputs)`, `make_inputs(generator)`, absolute tolerance, providers by name."""

    name: str
    reference: Callable[..., torch.Tensor]
    make_inputs: Callable[[torch.Generator], Inputs]
    tolerance: float
    providers: dict[str, Callable[..., torch.Tensor]]


def _flat(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().numpy().reshape(-1).copy()


def _linear_inputs(generator: torch.Generator) -> Inputs:
    rows = int(torch.randint(1, 40, (1,), generator=generator))
    return {
        "x": torch.randn(rows, 70, generator=generator),
        "weight": torch.randn(45, 70, generator=generator).half().float(),
    }


def _linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, in] x [out, in] -> [T, out]."""
    return x @ weight.T


def linear_numba(x: torch.Tensor, weight: torch.Tensor, storage: str = "float32") -> torch.Tensor:
    """One thread's packed product; `weight` must be exact in `storage`."""
    return packed_product(x, weight, storage, cpu.STORE)[:, : weight.shape[0]]


def packed_product(x: torch.Tensor, weight: torch.Tensor, storage: str, epilogue: int) -> torch.Tensor:
    """One thread's `linear` with that epilogue into zeros; the columns of whole panels."""
    panels = cpu.pack_weight(weight, storage)
    rows, features = x.shape
    height = cpu.tile_height(rows)
    width = panels.shape[0] * (VECTOR_WIDTH if epilogue == cpu.SWIGLU else PANEL_WIDTH)
    out = np.zeros((rows + height) * width, np.float32)
    cpu.linear(
        _in_tiles(x, height), height, features, rows, features, panels, out, width, epilogue,
        np.zeros(cpu.SCRATCH_SIZE, np.float32), np.zeros(8, np.int64), np.zeros(1, np.int64), 0,
    )  # fmt: skip
    if epilogue == cpu.SWIGLU:
        return _from_tiles(out, height, rows, width)
    return torch.from_numpy(out[: rows * width]).view(rows, width)


def _in_tiles(x: torch.Tensor, height: int) -> np.ndarray:
    """[T, F] -> [tiles, F, height] flat, as products read it; the last tile is filled up with NaN."""
    rows, features = x.shape
    padded = torch.full((-(-rows // height) * height, features), math.nan)
    padded[:rows] = x
    return padded.view(-1, height, features).transpose(1, 2).reshape(-1).numpy()


def _from_tiles(x: np.ndarray, height: int, rows: int, features: int) -> torch.Tensor:
    """The inverse of `_in_tiles`."""
    tiles = -(-rows // height)
    tiled = torch.from_numpy(x[: tiles * height * features]).view(tiles, features, height)
    return tiled.transpose(1, 2).reshape(-1, features)[:rows]


def _norm_inputs(generator: torch.Generator) -> Inputs:
    return {"x": torch.randn(5, 96, generator=generator) * 3, "gain": torch.randn(96, generator=generator), "eps": 1e-5}


def _norm_reference(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """[T, H] -> [T, H]: x / sqrt(mean(x^2) + eps) * gain."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


def rms_norm_numba(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """As one tile."""
    rows, width = x.shape
    out, scales = np.zeros(x.numel(), np.float32), np.zeros(rows, np.float32)
    places = np.arange(rows) * width
    scratch = np.zeros(rows * VECTOR_WIDTH, np.float32)
    cpu.rms_norm_tile(_flat(x), places, rows, gain.numpy(), width, np.float32(eps), out, 0, rows, scales, scratch)
    return _from_tiles(out, rows, rows, width)


def _swiglu_inputs(generator: torch.Generator) -> Inputs:
    rows = int(torch.randint(1, 40, (1,), generator=generator))
    return {
        "x": torch.randn(rows, 70, generator=generator),
        "gate": torch.randn(45, 70, generator=generator),
        "up": torch.randn(45, 70, generator=generator),
    }


def _swiglu_reference(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[T, in] x two [out, in] -> [T, out]: silu(x @ gate^T) * (x @ up^T) (Shazeer 2020)."""
    gated = x @ gate.T
    return gated * torch.sigmoid(gated) * (x @ up.T)


def swiglu_numba(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The product with interleaved weights and the activation as its epilogue."""
    out = packed_product(x, cpu.interleave_gate_up(gate, up), "float32", cpu.SWIGLU)
    return out[:, : gate.shape[0]]


def _attention_inputs(generator: torch.Generator) -> Inputs:
    heads = int(torch.randint(1, 4, (1,), generator=generator))
    group = int(torch.randint(1, 5, (1,), generator=generator))
    length = int(torch.randint(1, 90, (1,), generator=generator))
    dim = 2 * int(torch.randint(2, 35, (1,), generator=generator))
    return {
        "q": torch.randn(length, heads * group, dim, generator=generator),
        "k": torch.randn(length, heads, dim, generator=generator),
        "v": torch.randn(length, heads, dim, generator=generator),
        "cos": torch.rand(length, dim // 2, generator=generator) * 2 - 1,
        "sin": torch.rand(length, dim // 2, generator=generator) * 2 - 1,
    }


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


def _attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Rotary embedding, then causal grouped-query attention: q [T, heads, D], k and v [T, kv heads, D] -> as q."""
    group = q.shape[1] // k.shape[1]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin).repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[1:]).triu(1).bool()
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def paged_attention_numba(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The sequence through scattered cache blocks, in tiles of as many tokens as the step would use."""
    length, heads, dim = q.shape
    kv_heads = k.shape[1]
    width = -(-dim // PANEL_WIDTH) * PANEL_WIDTH
    blocks = -(-length // PANEL_WIDTH)
    table = np.arange(blocks, 0, -1)
    # Keys that were not written are no numbers, which the result would show; values must not be, they are multiplied.
    kv = np.full(((blocks + 1) * kv_heads, cpu.kv_block_size(dim, width)), np.nan, np.float32)
    kv[:, PANEL_WIDTH * dim :] = 0
    qkv = _flat(torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1))
    stride = (heads + 2 * kv_heads) * dim
    positions = np.arange(length)
    slots = table[positions // PANEL_WIDTH] * PANEL_WIDTH + positions % PANEL_WIDTH
    group = heads // kv_heads
    columns = [cpu.head_columns(head, group, kv_heads, dim) for head in range(kv_heads)]
    for head in range(kv_heads):
        cpu.rotate_and_cache(
            qkv, *columns[head], stride, 0, length, positions, slots, head, group, kv_heads, dim, width,
            _flat(cos), _flat(sin), kv.reshape(-1),
        )  # fmt: skip
    step = max(1, TILE_ROWS // group)
    out = np.zeros(length * heads * dim, np.float32)
    queries = np.zeros(step * group * width, np.float32)
    scores = np.zeros((step * group, (blocks + 1) * PANEL_WIDTH), np.float32)
    for first in range(0, length, step):
        for head in range(kv_heads):
            cpu.attention_tile(
                qkv, first * stride + columns[head][0], stride, min(step, length - first), first, table[None], 0, head,
                group, kv_heads, dim, width, kv.reshape(-1), out, first * heads * dim + head * group * dim,
                heads * dim, queries, scores.reshape(-1), scores.shape[1],
                np.zeros(scores.size, np.float32), np.zeros(step * group, np.float32),
                np.zeros(cpu.SCRATCH_SIZE, np.float32), np.zeros(8, np.int64), 0, head + 1,
                blocks if head + 1 < kv_heads else 0,
            )  # fmt: skip
    return torch.from_numpy(out).view(length, heads, dim)


def _argmax_inputs(generator: torch.Generator) -> Inputs:
    return {"logits": torch.randint(-20, 20, (6, 301), generator=generator).float()}


def _argmax_reference(logits: torch.Tensor) -> torch.Tensor:
    """[R, V] -> [R]: the lowest index of the largest value."""
    return (logits == logits.max(-1, keepdim=True).values).int().argmax(-1)


def argmax_numba(logits: torch.Tensor) -> torch.Tensor:
    """Row by row with the CPU kernel."""
    flat, width = _flat(logits), logits.shape[1]
    return torch.tensor([cpu.argmax_row(flat, row * width, width) for row in range(logits.shape[0])])


def _normaliser_inputs(generator: torch.Generator) -> Inputs:
    return {"logits": torch.randn(4, 3000, generator=generator) * 8}


def _normaliser_reference(logits: torch.Tensor) -> torch.Tensor:
    """[R, V] -> [R]: the logarithm of the sum of exponentials."""
    return logits.logsumexp(-1)


def log_normaliser_numba(logits: torch.Tensor) -> torch.Tensor:
    """Row by row with the CPU kernel."""
    flat, width = _flat(logits), logits.shape[1]
    return torch.tensor([cpu.log_normaliser_row(flat, row * width, width) for row in range(logits.shape[0])])


def _linear_float16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear_numba(x, weight, "float16")


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "linear", _linear_reference, _linear_inputs, 2e-5, {"numba": linear_numba, "numba-float16": _linear_float16}
        ),
        Op("rms_norm", _norm_reference, _norm_inputs, 1e-5, {"numba": rms_norm_numba}),
        Op("swiglu", _swiglu_reference, _swiglu_inputs, 2e-4, {"numba": swiglu_numba}),
        Op("paged_attention", _attention_reference, _attention_inputs, 1e-5, {"numba": paged_attention_numba}),
        Op("log_normaliser", _normaliser_reference, _normaliser_inputs, 1e-5, {"numba": log_normaliser_numba}),
        Op("argmax", _argmax_reference, _argmax_inputs, 0.0, {"numba": argmax_numba}),
    )
}
