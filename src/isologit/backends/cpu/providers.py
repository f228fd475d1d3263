"""The CPU kernels as providers of `isologit.ops`: each operation by itself, on tensors, as one thread computes it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from isologit.backends.cpu import kernels
from isologit.backends.cpu.simd import PANEL_WIDTH, TILE_ROWS
from isologit.common.compiler import VECTOR_WIDTH


def _flat(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().numpy().reshape(-1).copy()


def linear_numba(x: torch.Tensor, weight: torch.Tensor, storage: str = "float32") -> torch.Tensor:
    """One thread's packed product; `weight` must be exact in `storage`."""
    return packed_product(x, weight, storage, kernels.STORE)[:, : weight.shape[0]]


def packed_product(
    x: torch.Tensor, weight: torch.Tensor, storage: str, epilogue: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """One thread's `linear` with that epilogue into zeros; the columns of whole panels. bias: [rows of `weight`]."""
    panels = kernels.pack_weight(weight, storage)
    rows, features = x.shape
    width = panels.shape[0] * (VECTOR_WIDTH if epilogue == kernels.SWIGLU else PANEL_WIDTH)
    out = np.zeros(rows * width, np.float32)
    starts = np.zeros(max(4, panels.shape[0]) * PANEL_WIDTH, np.float32)
    if bias is not None:
        starts[: len(bias)] = bias.numpy()
    step = PANEL_WIDTH if bias is not None else 0
    kernels.linear(
        _in_tiles(x), features, rows, features, panels, starts, step, out, width, epilogue,
        np.zeros(kernels.SCRATCH_SIZE, np.float32), np.zeros(8, np.int64), np.zeros(1, np.int64), 0,
    )  # fmt: skip
    if epilogue == kernels.SWIGLU:
        return _from_tiles(out, rows, width)
    return torch.from_numpy(out).view(rows, width)


def _tiles(rows: int) -> list[tuple[int, int]]:
    """First row and last + 1 of each tile."""
    tiles = kernels.tile_count(rows)
    return [kernels.even_share(tile, tiles, rows) for tile in range(tiles)]


def _in_tiles(x: torch.Tensor) -> np.ndarray:
    """[T, F] -> for each tile [F, its rows], flat, as products read it."""
    return torch.cat([x[top:end].T.reshape(-1) for top, end in _tiles(len(x))]).numpy()


def _from_tiles(x: np.ndarray, rows: int, features: int) -> torch.Tensor:
    """The inverse of `_in_tiles`."""
    flat = torch.from_numpy(x)
    return torch.cat([flat[top * features : end * features].view(features, -1).T for top, end in _tiles(rows)])


def rms_norm_numba(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As one tile."""
    rows, width = x.shape
    out, scales = np.zeros(x.numel(), np.float32), np.zeros(rows, np.float32)
    places = np.arange(rows) * width
    scratch = np.zeros(rows * VECTOR_WIDTH, np.float32)
    kernels.rms_norm_tile(_flat(x), places, rows, weight.numpy(), width, np.float32(eps), out, 0, scales, scratch)
    return torch.from_numpy(out).view(width, rows).T


def swiglu_numba(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The product with interleaved weights and the activation as its epilogue."""
    out = packed_product(x, kernels.interleave_gate_up(gate, up), "float32", kernels.SWIGLU)
    return out[:, : gate.shape[0]]


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
    kv = np.full(((blocks + 1) * kv_heads, kernels.kv_block_size(dim, width)), np.nan, np.float32)
    kv[:, PANEL_WIDTH * dim :] = 0
    qkv = _flat(torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1))
    stride = (heads + 2 * kv_heads) * dim
    positions = np.arange(length)
    slots = table[positions // PANEL_WIDTH] * PANEL_WIDTH + positions % PANEL_WIDTH
    group = heads // kv_heads
    columns = [kernels.head_columns(head, group, kv_heads, dim) for head in range(kv_heads)]
    for head in range(kv_heads):
        kernels.rotate_and_cache(
            qkv, *columns[head], stride, 0, length, positions, slots, head, group, kv_heads, dim, width,
            _flat(cos), _flat(sin), kv.reshape(-1),
        )  # fmt: skip
    step = max(1, TILE_ROWS // group)
    out = np.zeros(length * heads * dim, np.float32)
    queries = np.zeros(step * group * width, np.float32)
    scores = np.zeros((step * group, (blocks + 1) * PANEL_WIDTH), np.float32)
    for first in range(0, length, step):
        for head in range(kv_heads):
            kernels.attention_tile(
                qkv, first * stride + columns[head][0], stride, min(step, length - first), first, table[None], 0, head,
                group, kv_heads, dim, width, kv.reshape(-1), out, first * heads * dim + head * group * dim,
                heads * dim, queries, scores.reshape(-1), scores.shape[1],
                np.zeros(scores.size, np.float32), np.zeros(step * group, np.float32),
                np.zeros(kernels.SCRATCH_SIZE, np.float32), np.zeros(8, np.int64), 0, head + 1,
                blocks if head + 1 < kv_heads else 0,
            )  # fmt: skip
    return torch.from_numpy(out).view(length, heads, dim)


def argmax_numba(logits: torch.Tensor) -> torch.Tensor:
    """Row by row with the CPU kernel."""
    flat, width = _flat(logits), logits.shape[1]
    return torch.tensor([kernels.argmax_row(flat, row * width, width) for row in range(logits.shape[0])])


def log_normaliser_numba(logits: torch.Tensor) -> torch.Tensor:
    """Row by row with the CPU kernel."""
    flat, width = _flat(logits), logits.shape[1]
    return torch.tensor([kernels.log_normaliser_row(flat, row * width, width) for row in range(logits.shape[0])])


def _linear_float16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear_numba(x, weight, "float16")


PROVIDERS: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
    "linear": {"numba": linear_numba, "numba-float16": _linear_float16},
    "rms_norm": {"numba": rms_norm_numba},
    "swiglu": {"numba": swiglu_numba},
    "paged_attention": {"numba": paged_attention_numba},
    "log_normaliser": {"numba": log_normaliser_numba},
    "argmax": {"numba": argmax_numba},
}
