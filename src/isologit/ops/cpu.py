"""The CPU kernels: what one thread does of each operation, in float32.

Every kernel is written so that the arithmetic of one token row never depends on the other rows of the batch (fixed
reduction order per row): batch invariance is a property of the kernels, not a mode.
Arrays are flat (1-D) where a register tile reads them; strides count elements. `panels` are weights packed by
`pack_weight`: [panels, in_features, PANEL_WIDTH]. What a product reads is stored tile by tile: the rows of a tile side
by side for each feature, [tiles, features, height], so that a register tile follows one pointer; `tile_height` says how
many rows that is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit

from isologit.ops.simd import (
    CACHE_LINE,
    EPILOGUES,
    PANEL_WIDTH,
    PREFETCH_DEPTH,
    TILE_ROWS,
    VECTOR_WIDTH,
    atomic_add,
    atomic_load,
    exp_in_place,
    exp_sum,
    make_tile_product,
    row_max,
    transpose_block,
    yield_processor,
)

COUNTER_STRIDE = 8  # int64 elements between counters: one cache line each
_SPINS_BEFORE_YIELD = 2000
# NOTE: names of their own, so that Numba drops what they rule out before compiling it.
_TALL_TILES = TILE_ROWS == 12
_FITS_SQUARE = TILE_ROWS <= VECTOR_WIDTH
ZEROS = TILE_ROWS * PANEL_WIDTH  # where the zeros behind a thread's scratch rows begin
SCRATCH_SIZE = ZEROS + 4 * PANEL_WIDTH  # float32 elements of a thread's scratch rows and those zeros


def panel_count(out_features: int) -> int:
    """Number of weight panels, the last one padded with zeros."""
    return -(-out_features // PANEL_WIDTH)


def interleave_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[I, H] gate and up -> rows in groups of VECTOR_WIDTH gate rows, then the matching up rows (zero-padded)."""
    features, hidden = gate.shape
    groups = -(-features // VECTOR_WIDTH)
    padded = torch.zeros((2, groups * VECTOR_WIDTH, hidden), dtype=gate.dtype)
    padded[0, :features] = gate
    padded[1, :features] = up
    return padded.view(2, groups, VECTOR_WIDTH, hidden).transpose(0, 1).reshape(-1, hidden)


def pack_weight(weight: torch.Tensor, storage: str) -> np.ndarray:
    """[out_features, in_features] -> [panels, in_features, PANEL_WIDTH] (float16 as int16 bits, bfloat16 as uint16)."""
    out_features, in_features = weight.shape
    panels = panel_count(out_features)
    padded = torch.zeros((panels * PANEL_WIDTH, in_features), dtype=getattr(torch, storage))
    padded[:out_features] = weight
    packed = padded.view(panels, PANEL_WIDTH, in_features).transpose(1, 2).contiguous()
    bits = {"float32": torch.float32, "float16": torch.int16, "bfloat16": torch.uint16}[storage]
    return packed.view(bits).numpy()


@njit(nogil=True)
def barrier(sync, num_threads):
    """Wait until all threads of the step arrive. `sync[0]` (int64) counts arrivals since the step began."""
    arrived = atomic_add(sync, 0, 1) + 1
    target = -(-arrived // num_threads) * num_threads
    spins = 0
    while atomic_load(sync, 0) < target:
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:
            yield_processor()


@njit(nogil=True)
def tile_height(rows):
    """Rows of a tile in a step of `rows` rows: two of eight go before a tall one and a very short one."""
    if TILE_ROWS < rows <= 16 and _TALL_TILES:
        return 8
    return max(1, min(rows, TILE_ROWS))


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _norm_scale(x, offset, size, eps):
    """1 / sqrt(mean(x^2) + eps) of one row (Zhang and Sennrich 2019, equation 4)."""
    total = np.float32(0.0)
    for i in range(size):
        total += x[offset + i] * x[offset + i]
    return np.float32(1.0) / np.float32(math.sqrt(total / np.float32(size) + eps))


@njit(nogil=True)
def rms_norm_tile(x, offsets, rows, gain, size, eps, out, out_offset, height, scales, scratch):
    """Norm of the rows of `x` that begin at `offsets`, stored as one tile of `out`.

    scales: `rows` float32 and scratch: TILE_ROWS * VECTOR_WIDTH float32 of this thread.
    """
    for r in range(rows):
        scales[r] = _norm_scale(x, offsets[r], size, eps)
    for first in range(0, size, VECTOR_WIDTH):
        width = min(VECTOR_WIDTH, size - first)
        for r in range(rows):
            source = offsets[r] + first
            for i in range(width):
                scratch[r * VECTOR_WIDTH + i] = x[source + i] * scales[r] * gain[first + i]
        pack_tile(scratch, 0, VECTOR_WIDTH, rows, width, out, out_offset + first * height, height)


@njit(nogil=True)
def pack_tile(x, x_offset, x_stride, rows, size, out, out_offset, height):
    """Rows of `x` stored as one tile of `out`."""
    done = 0
    if _FITS_SQUARE:
        while rows == TILE_ROWS and done + VECTOR_WIDTH <= size:
            transpose_block(x, x_offset + done, x_stride, out, out_offset + done * height)
            done += VECTOR_WIDTH
    for i in range(done, size):
        for r in range(rows):
            out[out_offset + i * height + r] = x[x_offset + r * x_stride + i]


def _make_tiles(epilogue: str) -> Any:
    """Product of any number of rows with one panel, built from register tiles of fixed heights.

    What has no tile of its own is shared evenly by two: a tile of one row has too few chains in flight to hide the
    latency of the multiply-add.
    """
    t1 = make_tile_product(1, epilogue)
    t2 = make_tile_product(2, epilogue)
    t3 = make_tile_product(3, epilogue)
    t4 = make_tile_product(4, epilogue)
    t5 = make_tile_product(5, epilogue)
    t6 = make_tile_product(6, epilogue)
    t8 = make_tile_product(8, epilogue)
    t12 = make_tile_product(12, epilogue)

    @njit(nogil=True)
    def tiles(
        x, x_offset, x_step, w, w_offset, w_stride, depth, fetch, start, start_offset, start_stride,
        out, out_offset, out_stride, rows,
    ):  # fmt: skip
        r = 0
        while r < rows:
            n = min(TILE_ROWS, rows - r)
            xo = x_offset + r
            oo = out_offset + r * out_stride
            so = start_offset + r * start_stride
            if _TALL_TILES:
                if n == 12:
                    t12(
                        x, xo, x_step, w, w_offset, w_stride, depth, fetch, start, so, start_stride,
                        out, oo, out_stride,
                    )  # fmt: skip
                    r += 12
                    continue
                if n == 8:
                    t8(
                        x, xo, x_step, w, w_offset, w_stride, depth, fetch, start, so, start_stride,
                        out, oo, out_stride,
                    )  # fmt: skip
                    r += 8
                    continue
            if n > 6:
                n = (n + 1) // 2
            if n == 6:
                t6(x, xo, x_step, w, w_offset, w_stride, depth, fetch, start, so, start_stride, out, oo, out_stride)
            elif n == 5:
                t5(x, xo, x_step, w, w_offset, w_stride, depth, fetch, start, so, start_stride, out, oo, out_stride)
            elif n == 4:
                t4(x, xo, x_step, w, w_offset, w_stride, depth, fetch, start, so, start_stride, out, oo, out_stride)
            elif n == 3:
                t3(x, xo, x_step, w, w_offset, w_stride, depth, fetch, start, so, start_stride, out, oo, out_stride)
            elif n == 2:
                t2(x, xo, x_step, w, w_offset, w_stride, depth, fetch, start, so, start_stride, out, oo, out_stride)
            else:
                t1(x, xo, x_step, w, w_offset, w_stride, depth, fetch, start, so, start_stride, out, oo, out_stride)
            r += n

    return tiles


STORE, ADD, SWIGLU = range(len(EPILOGUES))  # what `linear` does with a product

dot_tiles = _make_tiles("store")
_accumulate_tiles = _make_tiles("add")
_swiglu_tiles = _make_tiles("swiglu")

_dot_1x4 = make_tile_product(1, "store", panels=4)
_dot_2x2 = make_tile_product(2, "store", panels=2)
_accumulate_1x4 = make_tile_product(1, "add", panels=4)
_accumulate_2x2 = make_tile_product(2, "add", panels=2)
_swiglu_1x4 = make_tile_product(1, "swiglu", panels=4)
_swiglu_2x2 = make_tile_product(2, "swiglu", panels=2)


@njit(nogil=True)
def linear(
    x, height, x_features, rows, in_features, panels, out, out_stride, epilogue, scratch, offsets, counters, counter
):
    """One thread's share of `out = x @ W^T` with the given epilogue.

    x: [tiles, x_features, height], of which the first `in_features` count. W: the panels. out: rows of `out_stride`;
    with SWIGLU it is stored in tiles of `out_stride` features as `x` is. Threads share the panels through
    `counters[counter]`, so a core that another process slows down takes fewer. `scratch` holds SCRATCH_SIZE float32,
    zero at first, and `offsets` 4 int64; both belong to this thread.
    """
    num_panels = panels.shape[0]
    flat = panels.reshape(-1)
    panel_size = in_features * PANEL_WIDTH
    panel_columns = VECTOR_WIDTH if epilogue == SWIGLU else PANEL_WIDTH
    # NOTE: every tall tile asks for another part of the next panel, so that it is in the cache when its turn comes.
    fetch_size = in_features // PREFETCH_DEPTH * (CACHE_LINE // flat.itemsize)
    side_by_side = 4 if rows == 1 else 2 if rows == 2 else 1
    chunk = max(side_by_side, min(8, num_panels // 32))
    while True:
        first = atomic_add(counters, counter, chunk)
        if first >= num_panels:
            break
        last = min(num_panels, first + chunk)
        panel = first
        while panel < last:
            wo = panel * panel_size
            column = panel * panel_columns
            if side_by_side > 1 and panel + side_by_side <= last:
                for i in range(side_by_side):
                    offsets[i] = wo + i * panel_size
                fetch = side_by_side * panel_size
                if epilogue == SWIGLU:
                    width = side_by_side * panel_columns
                    _short_product(x, flat, offsets, in_features, fetch, scratch, scratch, 0, width, rows, epilogue)
                    _store_in_tile(scratch, width, rows, width, out, column * height, height)
                else:
                    _short_product(
                        x, flat, offsets, in_features, fetch, scratch, out, column, out_stride, rows, epilogue
                    )
                panel += side_by_side
                continue
            for top in range(0, rows, height):
                n = min(height, rows - top)
                fetch = panel_size
                if rows > height:
                    fetch += top // height * fetch_size
                    if fetch >= 2 * panel_size:
                        fetch = 0
                xo = top * x_features
                if epilogue == SWIGLU:
                    _swiglu_tiles(
                        x, xo, height, flat, wo, PANEL_WIDTH, in_features, fetch, scratch, ZEROS, 0,
                        scratch, 0, VECTOR_WIDTH, n,
                    )  # fmt: skip
                    _store_in_tile(
                        scratch, VECTOR_WIDTH, n, VECTOR_WIDTH, out, top * out_stride + column * height, height
                    )
                elif epilogue == ADD:
                    _accumulate_tiles(
                        x, xo, height, flat, wo, PANEL_WIDTH, in_features, fetch, scratch, ZEROS, 0,
                        out, top * out_stride + column, out_stride, n,
                    )  # fmt: skip
                else:
                    dot_tiles(
                        x, xo, height, flat, wo, PANEL_WIDTH, in_features, fetch, scratch, ZEROS, 0,
                        out, top * out_stride + column, out_stride, n,
                    )  # fmt: skip
            panel += 1


@njit(nogil=True)
def _store_in_tile(x, x_stride, rows, columns, out, out_offset, height):
    """Columns of a tile, from rows."""
    for i in range(columns):
        for r in range(rows):
            out[out_offset + i * height + r] = x[r * x_stride + i]


@njit(nogil=True)
def _short_product(x, w, offsets, depth, fetch, scratch, out, out_offset, out_stride, rows, epilogue):
    """One row with four panels, or two rows with two."""
    if rows == 1:
        if epilogue == SWIGLU:
            _swiglu_1x4(x, 0, 1, w, offsets, PANEL_WIDTH, depth, fetch, scratch, ZEROS, 0, out, out_offset, out_stride)
        elif epilogue == ADD:
            _accumulate_1x4(
                x, 0, 1, w, offsets, PANEL_WIDTH, depth, fetch, scratch, ZEROS, 0, out, out_offset, out_stride
            )
        else:
            _dot_1x4(x, 0, 1, w, offsets, PANEL_WIDTH, depth, fetch, scratch, ZEROS, 0, out, out_offset, out_stride)
    elif epilogue == SWIGLU:
        _swiglu_2x2(x, 0, 2, w, offsets, PANEL_WIDTH, depth, fetch, scratch, ZEROS, 0, out, out_offset, out_stride)
    elif epilogue == ADD:
        _accumulate_2x2(x, 0, 2, w, offsets, PANEL_WIDTH, depth, fetch, scratch, ZEROS, 0, out, out_offset, out_stride)
    else:
        _dot_2x2(x, 0, 2, w, offsets, PANEL_WIDTH, depth, fetch, scratch, ZEROS, 0, out, out_offset, out_stride)


@njit(nogil=True, fastmath={"contract"})
def rotate_row(x, offset, half, cos, sin, angle_offset):
    """Rotary embedding of one head in place, half-rotation layout (x[i], x[i + half]) as Hugging Face stores it."""
    for i in range(half):
        a = x[offset + i]
        b = x[offset + half + i]
        c = cos[angle_offset + i]
        s = sin[angle_offset + i]
        x[offset + i] = a * c - b * s
        x[offset + half + i] = b * c + a * s


@njit(nogil=True)
def rotate_and_cache(
    qkv, stride, row, rows, positions, slots, first_head, last_head, num_heads, num_kv_heads, head_dim, value_width,
    cos, sin, keys, values,
):  # fmt: skip
    """Rotate queries and keys of the KV heads from `first_head` on and write their keys and values into the cache.

    The rows are `rows` consecutive tokens of one sequence from `row` on. qkv rows: [q heads | k heads | v heads] x
    head_dim. keys: [blocks, kv heads, head_dim, PANEL_WIDTH] flat, so that one block is a product panel; values:
    [blocks, kv heads, PANEL_WIDTH, value_width] flat. Tokens of one block are written together: their keys are
    neighbours in memory.
    """
    group = num_heads // num_kv_heads
    half = head_dim // 2
    last = row + rows
    while row < last:
        column = slots[row] % PANEL_WIDTH
        count = min(last - row, PANEL_WIDTH - column)
        for r in range(row, row + count):
            for head in range(first_head * group, last_head * group):
                rotate_row(qkv, r * stride + head * head_dim, half, cos, sin, positions[r] * half)
            for head in range(num_heads + first_head, num_heads + last_head):
                rotate_row(qkv, r * stride + head * head_dim, half, cos, sin, positions[r] * half)
        for head in range(first_head, last_head):
            source = row * stride + (num_heads + head) * head_dim
            panel = slots[row] // PANEL_WIDTH * num_kv_heads + head
            target = panel * head_dim * PANEL_WIDTH + column
            for i in range(head_dim):
                for r in range(count):
                    keys[target + i * PANEL_WIDTH + r] = qkv[source + r * stride + i]
            source += num_kv_heads * head_dim
            target = (panel * PANEL_WIDTH + column) * value_width
            for r in range(count):
                for i in range(head_dim):
                    values[target + r * value_width + i] = qkv[source + r * stride + i]
        row += count


@njit(nogil=True)
def softmax_row(scores, offset, length, padded, scale):
    """exp(scale * (score - max)) in place for `length` scores, zeros up to `padded`; returns 1 / sum.

    NaN among the scores makes what is returned NaN.
    """
    top = row_max(scores, offset, length)
    total = exp_in_place(scores, offset, length, top, scale) + (top - top)  # exp clamps, which would lose a NaN
    for i in range(length, padded):
        scores[offset + i] = np.float32(0.0)
    return np.float32(1.0) / total


@njit(nogil=True)
def attention_tile(
    qkv, qkv_stride, first_row, num_rows, first_position, table, kv_head, num_heads, num_kv_heads, head_dim,
    value_width, keys, values, out, out_stride, queries, scores, scores_stride, weights, sums, scratch, offsets,
    next_table, next_head, next_blocks,
):  # fmt: skip
    """Causal attention of `num_rows` consecutive tokens of one sequence for the query heads of one KV head.

    Two passes over the blocks of `table` (block ids of the sequence): all scores of a row, softmax, then the weighted
    sum of values. The reduction order of a row depends on its position alone. Scratch of this thread, for as many rows
    as there are tokens times heads: queries (value_width each), scores (scores_stride each), weights (the same), sums.
    This thread's next work is KV head `next_head` of the first `next_blocks` blocks of `next_table`: its keys and
    values are asked into the cache meanwhile.
    """
    group = num_heads // num_kv_heads
    total_rows = num_rows * group
    scale = np.float32(1.0 / math.sqrt(head_dim))
    source = first_row * qkv_stride + kv_head * group * head_dim
    if group == 1:
        pack_tile(qkv, source, qkv_stride, num_rows, head_dim, queries, 0, num_rows)
    else:
        for r in range(num_rows):
            for g in range(group):
                for i in range(head_dim):
                    queries[i * total_rows + r * group + g] = qkv[source + r * qkv_stride + g * head_dim + i]
    context = first_position + num_rows
    num_blocks = (context + PANEL_WIDTH - 1) // PANEL_WIDTH
    panel_size = head_dim * PANEL_WIDTH
    b = 0
    while b < num_blocks:
        ahead = min(4, num_blocks - b)
        fetch = 0
        if b < next_blocks:
            fetch = ((next_table[b] - table[b]) * num_kv_heads + next_head - kv_head) * panel_size
        for i in range(ahead):
            offsets[i] = (table[b + i] * num_kv_heads + kv_head) * panel_size
            if b < next_blocks and (
                b + i >= next_blocks or next_table[b + i] - table[b + i] != next_table[b] - table[b]
            ):
                ahead = i  # products side by side ask for memory at one distance
                break
        if total_rows == 1 and ahead == 4:
            _dot_1x4(
                queries, 0, 1, keys, offsets, PANEL_WIDTH, head_dim, fetch, scratch, ZEROS, 0,
                scores, b * PANEL_WIDTH, scores_stride,
            )  # fmt: skip
            b += 4
        elif total_rows == 2 and ahead >= 2:
            _dot_2x2(
                queries, 0, 2, keys, offsets, PANEL_WIDTH, head_dim, fetch, scratch, ZEROS, 0,
                scores, b * PANEL_WIDTH, scores_stride,
            )  # fmt: skip
            b += 2
        else:
            dot_tiles(
                queries, 0, total_rows, keys, offsets[0], PANEL_WIDTH, head_dim, fetch, scratch, ZEROS, 0,
                scores, b * PANEL_WIDTH, scores_stride, total_rows,
            )  # fmt: skip
            b += 1
    for r in range(num_rows):
        for g in range(group):
            row = r * group + g
            sums[row] = softmax_row(
                scores, row * scores_stride, first_position + r + 1, num_blocks * PANEL_WIDTH, scale
            )
    for i in range(total_rows * value_width):
        queries[i] = np.float32(0.0)
    if total_rows == 1:
        _weighted_values(
            scores, 1, context, num_blocks, table, kv_head, num_kv_heads, value_width, values, queries, offsets,
            next_table, next_head, next_blocks,
        )  # fmt: skip
    else:
        pack_tile(scores, 0, scores_stride, total_rows, num_blocks * PANEL_WIDTH, weights, 0, total_rows)
        _weighted_values(
            weights, total_rows, context, num_blocks, table, kv_head, num_kv_heads, value_width, values, queries,
            offsets, next_table, next_head, next_blocks,
        )  # fmt: skip
    for r in range(num_rows):
        for g in range(group):
            row = r * group + g
            target = (first_row + r) * out_stride + (kv_head * group + g) * head_dim
            for i in range(head_dim):
                out[target + i] = queries[row * value_width + i] * sums[row]


@njit(nogil=True)
def _weighted_values(
    weights,
    rows,
    context,
    num_blocks,
    table,
    kv_head,
    num_kv_heads,
    value_width,
    values,
    out,
    offsets,
    next_table,
    next_head,
    next_blocks,
):
    """Add the values of all blocks, weighted, to `out` [rows, value_width]. weights: [positions, rows]."""
    for b in range(num_blocks):
        depth = min(PANEL_WIDTH, context - b * PANEL_WIDTH)
        block = (table[b] * num_kv_heads + kv_head) * PANEL_WIDTH * value_width
        xo = b * PANEL_WIDTH * rows
        distance = 0
        if b < next_blocks:
            distance = ((next_table[b] - table[b]) * num_kv_heads + next_head - kv_head) * PANEL_WIDTH * value_width
        column = 0
        while column < value_width:
            ahead = min(4, (value_width - column) // PANEL_WIDTH)
            for i in range(ahead):
                offsets[i] = block + column + i * PANEL_WIDTH
            # The columns together ask for the next block in the order it lies in memory.
            fetch = distance + column * (depth - 1) if b < next_blocks else 0
            if rows == 1 and ahead == 4:
                _dot_1x4(
                    weights, xo, 1, values, offsets, value_width, depth, fetch, out, column, value_width,
                    out, column, value_width,
                )  # fmt: skip
                column += 4 * PANEL_WIDTH
            elif rows == 2 and ahead >= 2:
                _dot_2x2(
                    weights, xo, 2, values, offsets, value_width, depth, fetch, out, column, value_width,
                    out, column, value_width,
                )  # fmt: skip
                column += 2 * PANEL_WIDTH
            else:
                dot_tiles(
                    weights, xo, rows, values, block + column, value_width, depth, fetch, out, column, value_width,
                    out, column, value_width, rows,
                )  # fmt: skip
                column += PANEL_WIDTH


@njit(nogil=True)
def argmax_row(logits, offset, size):
    """Index of the largest value of one row, the lowest index on ties; -1 if any value is NaN."""
    best = row_max(logits, offset, size)
    for i in range(size):
        if logits[offset + i] == best:
            return i
    return -1


_EXP_CHUNK = 1024  # terms summed in float32 before they are added in float64


@njit(nogil=True)
def log_normaliser_row(logits, offset, size):
    """log(sum(exp(logits))) of one row, as float64: what turns a logit into the logarithm of a probability."""
    top = row_max(logits, offset, size)
    total = 0.0
    for first in range(0, size, _EXP_CHUNK):
        total += exp_sum(logits, offset + first, min(_EXP_CHUNK, size - first), top, np.float32(1.0))
    return top + math.log(total)
