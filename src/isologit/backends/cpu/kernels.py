"""The CPU kernels: what one thread does of each operation, in float32.

Every kernel is written so that the arithmetic of one token row never depends on the other rows of the batch (fixed
reduction order per row): batch invariance is a property of the kernels, not a mode.
Arrays are flat (1-D) where a register tile reads them; strides count elements. `panels` are weights packed by
`pack_weight`: [panels, in_features, PANEL_WIDTH]. What a product reads is stored tile by tile: the rows of a tile side
by side for each feature, [features, rows of the tile], so that a register tile follows one pointer; tile i of n holds
the i-th `even_share` of the rows. Loops along a row count in uint64: a signed index might be negative, which Python
allows, and the compiler would gather elements instead of loading vectors.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from isologit.backends.cpu.simd import (
    CACHE_LINE,
    PANEL_WIDTH,
    TILE_ROWS,
    atomic_add,
    atomic_load,
    exp_in_place,
    exp_sum,
    row_max,
    transpose_block,
    yield_processor,
)
from isologit.backends.cpu.tiles import EPILOGUES, make_tile_product
from isologit.common.compiler import VECTOR_WIDTH, njit

_FLOAT_LINE = CACHE_LINE // 4  # float32 of a cache line
COUNTER_STRIDE = 8  # int64 elements between counters: one cache line each
_SPINS_BEFORE_YIELD = 2000
# NOTE: a name of its own, so that Numba drops what it rules out before compiling it.
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
    padded = torch.zeros((2, groups * VECTOR_WIDTH, hidden), dtype=torch.promote_types(gate.dtype, up.dtype))
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


@njit(nogil=True, cache=True)
def pack_rows(rows, first, run, lane, out):
    """Row r of `rows` [n, in_features] to column `lane` + (first + r) % `run` of panel (first + r) // `run` of `out`.

    out: [panels, in_features, PANEL_WIDTH], of the same dtype. `run` rows lie side by side in a panel.
    """
    for r in range(rows.shape[0]):
        panel, column = (first + r) // run, lane + (first + r) % run
        for i in range(rows.shape[1]):
            out[panel, i, column] = rows[r, i]


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
def wait_until(counters, counter, value):
    """Wait until `counters[counter]` (int64) has the value."""
    spins = 0
    while atomic_load(counters, counter) != value:
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:
            yield_processor()


@njit(nogil=True)
def tile_count(rows):
    """Tiles of so many rows: as few as there can be."""
    return -(-rows // TILE_ROWS)


@njit(nogil=True)
def even_share(part, num_parts, count):
    """First and last + 1 of the part's share of `count`; shares differ by one at most."""
    return part * count // num_parts, (part + 1) * count // num_parts


@njit(nogil=True, forceinline=True)
def scale_row(x, offset, factor, out, out_offset, size):
    """`size` float32 times `factor`, into `out`."""
    source, target = np.uint64(offset), np.uint64(out_offset)
    for i in range(np.uint64(size)):
        out[target + i] = x[source + i] * factor


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _norm_scale(x, offset, size, eps):
    """1 / sqrt(mean(x^2) + eps) of one row (Zhang and Sennrich 2019, equation 4)."""
    offset = np.uint64(offset)
    total = np.float32(0.0)
    for i in range(np.uint64(size)):
        total += x[offset + i] * x[offset + i]
    return np.float32(1.0) / np.float32(math.sqrt(total / np.float32(size) + eps))


@njit(nogil=True)
def rms_norm_tile(x, offsets, rows, weight, size, eps, out, out_offset, scales, scratch):
    """Norm of the rows of `x` that begin at `offsets`, stored as one tile of `out`.

    scales: `rows` float32 and scratch: TILE_ROWS * VECTOR_WIDTH float32 of this thread.
    """
    for r in range(rows):
        scales[r] = _norm_scale(x, offsets[r], size, eps)
    for first in range(0, size, VECTOR_WIDTH):
        width = min(VECTOR_WIDTH, size - first)
        column = np.uint64(first)
        for r in range(rows):
            source, target = np.uint64(offsets[r] + first), np.uint64(r * VECTOR_WIDTH)
            for i in range(np.uint64(width)):
                scratch[target + i] = x[source + i] * scales[r] * weight[column + i]
        pack_tile(scratch, 0, VECTOR_WIDTH, rows, width, out, out_offset + first * rows, rows)


@njit(nogil=True)
def rms_norm_row(x, offset, weight, size, eps, out, out_offset):
    """Norm of one row, with the same arithmetic as `rms_norm_tile`."""
    scale = _norm_scale(x, offset, size, eps)
    source, target = np.uint64(offset), np.uint64(out_offset)
    for i in range(np.uint64(size)):
        out[target + i] = x[source + i] * scale * weight[i]


@njit(nogil=True)
def pack_tile(x, x_offset, x_stride, rows, size, out, out_offset, height):
    """Rows of `x` stored as one tile of `out`, or as part of one of `height` rows."""
    if height == 1:
        scale_row(x, x_offset, np.float32(1.0), out, out_offset, size)
        return
    done = 0
    if _FITS_SQUARE and 1 < rows <= TILE_ROWS:
        while done + VECTOR_WIDTH <= size:
            transpose_block(x, x_offset + done, x_stride, rows, out, out_offset + done * height, height)
            done += VECTOR_WIDTH
    for i in range(done, size):
        for r in range(rows):
            out[out_offset + i * height + r] = x[x_offset + r * x_stride + i]


STORE, ADD, SWIGLU = range(len(EPILOGUES))  # what `linear` does with a product

_ALL_HEIGHTS = tuple(range(1, TILE_ROWS + 1))
dot_tile = make_tile_product(_ALL_HEIGHTS, "store")
_accumulate_tile = make_tile_product(_ALL_HEIGHTS, "add")
_swiglu_tile = make_tile_product(_ALL_HEIGHTS, "swiglu")

_dot_1x1 = make_tile_product((1,), "store")
_dot_1x2 = make_tile_product((1,), "store", panels=2)
_dot_1x3 = make_tile_product((1,), "store", panels=3)
_dot_1x4 = make_tile_product((1,), "store", panels=4)
_dot_2x2 = make_tile_product((2,), "store", panels=2)
_accumulate_1x4 = make_tile_product((1,), "add", panels=4)
_accumulate_2x2 = make_tile_product((2,), "add", panels=2)
_swiglu_1x4 = make_tile_product((1,), "swiglu", panels=4)
_swiglu_2x2 = make_tile_product((2,), "swiglu", panels=2)


@njit(nogil=True)
def panel_portion(claim, num_panels, least):
    """First and last + 1 of the panels that the `claim`-th claim gets; past the last panel there are none.

    The last ones are taken `least` at a time, so that the threads end together.
    """
    chunk = max(least, min(8, num_panels // 32))
    num_chunks = (num_panels - num_panels // 16) // chunk
    if claim < num_chunks:
        return claim * chunk, (claim + 1) * chunk
    first = num_chunks * chunk + (claim - num_chunks) * least
    return first, min(num_panels, first + least)


@njit(nogil=True)
def linear(
    x, x_features, rows, in_features, panels, bias, bias_step, out, out_stride, epilogue, scratch, offsets,
    counters, counter,
):  # fmt: skip
    """One thread's share of `out = x @ W^T + bias` with the given epilogue.

    x: in tiles of `x_features` features, of which the first `in_features` count. W: the panels. bias: float32, panel
    p's begins at p * bias_step; without one it is 4 * PANEL_WIDTH zeros and the step is 0. out: rows of `out_stride`;
    with SWIGLU it is stored in tiles of `out_stride` features as `x` is. Threads share the panels through
    `counters[counter]`, so a core that another process slows down takes fewer. `scratch` holds SCRATCH_SIZE float32,
    zero at first, and `offsets` 8 int64; both belong to this thread.
    """
    num_panels = panels.shape[0]
    flat = panels.reshape(-1)
    panel_size = in_features * PANEL_WIDTH
    panel_columns = VECTOR_WIDTH if epilogue == SWIGLU else PANEL_WIDTH
    # NOTE: together the tiles prefetch the next panel, so that the memory has all the time there is.
    line = CACHE_LINE // flat.itemsize
    tiles = tile_count(rows)
    pace = -(-line // max(1, tiles))
    fetched_by_tile = in_features * PANEL_WIDTH * pace // line
    side_by_side = 4 if rows == 1 else 2 if rows == 2 else 1
    while True:
        panel, last = panel_portion(atomic_add(counters, counter, 1), num_panels, side_by_side)
        if panel >= num_panels:
            break
        while panel < last:
            wo = panel * panel_size
            column = panel * panel_columns
            if side_by_side > 1 and panel + side_by_side <= last:
                for i in range(side_by_side):
                    offsets[2 * i], offsets[2 * i + 1] = wo + i * panel_size, 0
                fetch = side_by_side * panel_size
                if epilogue == SWIGLU:
                    width = side_by_side * panel_columns
                    _short_product(
                        x, flat, offsets, in_features, fetch, bias, panel * bias_step, scratch, 0, width, rows, epilogue
                    )  # fmt: skip
                    pack_tile(scratch, 0, width, rows, width, out, column * rows, rows)
                else:
                    _short_product(
                        x,
                        flat,
                        offsets,
                        in_features,
                        fetch,
                        bias,
                        panel * bias_step,
                        out,
                        column,
                        out_stride,
                        rows,
                        epilogue,
                    )
                panel += side_by_side
                continue
            for tile in range(tiles):
                top, end = even_share(tile, tiles, rows)
                n = end - top
                fetch = panel_size + tile * fetched_by_tile
                xo = top * x_features
                if epilogue == SWIGLU:
                    _swiglu_tile(
                        x, xo, n, flat, wo, PANEL_WIDTH, in_features, fetch, pace, bias, panel * bias_step, 0,
                        scratch, 0, VECTOR_WIDTH, n,
                    )  # fmt: skip
                    pack_tile(scratch, 0, VECTOR_WIDTH, n, VECTOR_WIDTH, out, top * out_stride + column * n, n)
                elif epilogue == ADD:
                    _accumulate_tile(
                        x, xo, n, flat, wo, PANEL_WIDTH, in_features, fetch, pace, bias, panel * bias_step, 0,
                        out, top * out_stride + column, out_stride, n,
                    )  # fmt: skip
                else:
                    dot_tile(
                        x, xo, n, flat, wo, PANEL_WIDTH, in_features, fetch, pace, bias, panel * bias_step, 0,
                        out, top * out_stride + column, out_stride, n,
                    )  # fmt: skip
            panel += 1


@njit(nogil=True, cache=True)
def multiply_tiles(thread, num_threads, sync, x, panels, start, out, times):
    """The products of all full tiles of `x` [tiles, K, TILE_ROWS] with all `panels`, `times` times, by every thread.

    What the tile loop can do is measured with it; the results in `out` [threads, tile] are overwritten.
    """
    flat, tiles = panels.reshape(-1), x.reshape(-1)
    depth = x.shape[1]
    for _ in range(times):
        for panel in range(panels.shape[0]):
            for tile in range(x.shape[0]):
                dot_tile(
                    tiles, tile * depth * TILE_ROWS, TILE_ROWS, flat, panel * depth * PANEL_WIDTH, PANEL_WIDTH, depth,
                    0, 0, start, 0, 0, out[thread], 0, PANEL_WIDTH, TILE_ROWS,
                )  # fmt: skip
    barrier(sync, num_threads)


@njit(nogil=True)
def _short_product(x, w, offsets, depth, fetch, bias, first, out, out_offset, out_stride, rows, epilogue):
    """One row with four panels, or two rows with two."""
    pace = CACHE_LINE // w.itemsize
    if rows == 1:
        if epilogue == SWIGLU:
            _swiglu_1x4(
                x, 0, 1, w, offsets, PANEL_WIDTH, depth, fetch, pace, bias, first, 0, out, out_offset, out_stride, 1
            )
        elif epilogue == ADD:
            _accumulate_1x4(
                x, 0, 1, w, offsets, PANEL_WIDTH, depth, fetch, pace, bias, first, 0, out, out_offset, out_stride, 1
            )
        else:
            _dot_1x4(
                x, 0, 1, w, offsets, PANEL_WIDTH, depth, fetch, pace, bias, first, 0, out, out_offset, out_stride, 1
            )
    elif epilogue == SWIGLU:
        _swiglu_2x2(
            x, 0, 2, w, offsets, PANEL_WIDTH, depth, fetch, pace, bias, first, 0, out, out_offset, out_stride, 2
        )
    elif epilogue == ADD:
        _accumulate_2x2(
            x, 0, 2, w, offsets, PANEL_WIDTH, depth, fetch, pace, bias, first, 0, out, out_offset, out_stride, 2
        )
    else:
        _dot_2x2(x, 0, 2, w, offsets, PANEL_WIDTH, depth, fetch, pace, bias, first, 0, out, out_offset, out_stride, 2)


@njit(nogil=True, forceinline=True, fastmath={"contract"})
def rotate_row(x, offset, half, cos, sin, angle_offset):
    """Rotary embedding of one head in place, half-rotation layout (x[i], x[i + half]) as Hugging Face stores it."""
    first, second, angle = np.uint64(offset), np.uint64(offset + half), np.uint64(angle_offset)
    for i in range(np.uint64(half)):
        a = x[first + i]
        b = x[second + i]
        c = cos[angle + i]
        s = sin[angle + i]
        x[first + i] = a * c - b * s
        x[second + i] = b * c + a * s


@njit(nogil=True, forceinline=True)
def kv_block_size(head_dim, value_width):
    """float32 of one block of keys and values of one head."""
    return PANEL_WIDTH * (head_dim + value_width)


@njit(nogil=True, forceinline=True)
def head_columns(kv_head, group, num_kv_heads, head_dim):
    """Where the queries, the key and the value of a KV head begin in a row [q heads | k heads | v heads] x head_dim."""
    key = num_kv_heads * group + kv_head
    return kv_head * group * head_dim, key * head_dim, (key + num_kv_heads) * head_dim


@njit(nogil=True, forceinline=True)
def rotate_and_cache(
    x, queries, keys, values, stride, row, rows, positions, slots, kv_head, group, num_kv_heads, head_dim, value_width,
    cos, sin, kv,
):  # fmt: skip
    """Rotate queries and keys of one KV head and write its keys and values into the cache.

    The rows are `rows` consecutive tokens of one sequence from token `row` of the step on. In `x`, rows of `stride`,
    the first one's `group` query heads begin at `queries`, its key at `keys` and its value at `values`. kv: [blocks, kv
    heads, kv_block_size] flat. Of a block and head, first come the keys, [head_dim, PANEL_WIDTH], so that they are a
    product panel, then the values, [PANEL_WIDTH, value_width]: what is read together lies together. Tokens of one
    block are written together: their keys are neighbours in memory.
    """
    half = head_dim // 2
    done = 0
    while done < rows:
        slot = slots[row + done]
        column = slot % PANEL_WIDTH
        count = min(rows - done, PANEL_WIDTH - column)
        for r in range(done, done + count):
            angle = positions[row + r] * half
            for head in range(group):
                rotate_row(x, queries + r * stride + head * head_dim, half, cos, sin, angle)
            rotate_row(x, keys + r * stride, half, cos, sin, angle)
        block = (slot // PANEL_WIDTH * num_kv_heads + kv_head) * kv_block_size(head_dim, value_width)
        source, target = keys + done * stride, block + column
        for r in range(count):
            first, place = np.uint64(source + r * stride), np.uint64(target + r)
            for i in range(np.uint64(head_dim)):
                kv[place + i * np.uint64(PANEL_WIDTH)] = x[first + i]
        source, target = values + done * stride, block + PANEL_WIDTH * head_dim + column * value_width
        for r in range(count):
            scale_row(x, source + r * stride, np.float32(1.0), kv, target + r * value_width, head_dim)
        done += count


@njit(nogil=True, forceinline=True)
def softmax_row(scores, offset, length, padded, scale):
    """exp(scale * (score - max)) in place for `length` scores, zeros up to `padded`; returns 1 / sum.

    NaN among the scores makes what is returned NaN.
    """
    top = row_max(scores, offset, length)
    total = exp_in_place(scores, offset, length, top, scale) + (top - top)  # exp clamps, which would lose a NaN
    for i in range(length, padded):
        scores[offset + i] = np.float32(0.0)
    return np.float32(1.0) / total


@njit(nogil=True, forceinline=True)
def attention_tile(
    x, x_offset, x_stride, num_rows, first_position, tables, sequence, kv_head, group, num_kv_heads, head_dim,
    value_width, kv, out, out_offset, out_stride, queries, scores, scores_stride, weights, sums, scratch, offsets,
    next_sequence, next_head, next_blocks,
):  # fmt: skip
    """Causal attention of `num_rows` consecutive tokens of one sequence for the `group` query heads of one KV head.

    The first token's query heads begin at `x_offset`, and its result at `out_offset`, which may be the same place.
    Two passes over the sequence's blocks, whose ids are `tables[sequence]`: all scores of a row, softmax, then the
    weighted sum of values. The reduction order of a row depends on its position alone. Scratch of this thread, for as
    many rows as there are tokens times heads: queries (value_width each), scores (scores_stride each), weights (the
    same), sums; and 8 `offsets`. This thread's next work is KV head `next_head` of the first `next_blocks` blocks of
    `next_sequence`: its keys and values are prefetched meanwhile.
    """
    total_rows = num_rows * group
    scale = np.float32(1.0 / math.sqrt(head_dim))
    context = first_position + num_rows
    if group == 1:
        pack_tile(x, x_offset, x_stride, num_rows, head_dim, queries, 0, num_rows)
    else:
        for r in range(num_rows):
            pack_tile(x, x_offset + r * x_stride, head_dim, group, head_dim, queries, r * group, total_rows)
    _scores(
        queries, total_rows, context, tables, sequence, kv_head, num_kv_heads, head_dim, value_width, kv, scores,
        scores_stride, scratch, offsets, next_sequence, next_head, next_blocks,
    )  # fmt: skip
    padded = -(-context // PANEL_WIDTH) * PANEL_WIDTH
    for r in range(num_rows):
        for g in range(group):
            row = r * group + g
            sums[row] = softmax_row(scores, row * scores_stride, first_position + r + 1, padded, scale)
    pack_tile(scores, 0, scores_stride, total_rows, padded, weights, 0, total_rows)
    _weighted_values(
        weights, total_rows, context, tables, sequence, kv_head, num_kv_heads, head_dim, value_width, kv, queries,
        offsets, next_sequence, next_head, next_blocks,
    )  # fmt: skip
    for r in range(num_rows):
        for g in range(group):
            row = r * group + g
            target = out_offset + r * out_stride + g * head_dim
            scale_row(queries, row * value_width, sums[row], out, target, head_dim)


@njit(nogil=True, forceinline=True)
def _scores(
    queries, rows, context, tables, sequence, kv_head, num_kv_heads, head_dim, value_width, kv, scores, scores_stride,
    scratch, offsets, next_sequence, next_head, next_blocks,
):  # fmt: skip
    """Products of `rows` queries [head_dim, rows] with the keys of all blocks: `scores`, rows of `scores_stride`."""
    num_blocks = (context + PANEL_WIDTH - 1) // PANEL_WIDTH
    size = kv_block_size(head_dim, value_width)
    side_by_side = 2 if rows == 2 else 1
    b = 0
    while b < num_blocks:
        ahead = min(side_by_side, num_blocks - b)
        for i in range(ahead):
            place = (tables[sequence, b + i] * num_kv_heads + kv_head) * size
            offsets[2 * i], offsets[2 * i + 1] = place, 0
            if b + i < next_blocks:
                offsets[2 * i + 1] = (tables[next_sequence, b + i] * num_kv_heads + next_head) * size - place
        column = b * PANEL_WIDTH
        if rows > 2 or (rows == 2 and ahead == 1):
            _dot_rows(
                queries, 0, rows, kv, offsets[0], PANEL_WIDTH, head_dim, offsets[1], scratch, ZEROS, 0,
                scores, column, scores_stride, rows,
            )  # fmt: skip
        else:
            dot_short(
                queries, 0, rows, kv, offsets, PANEL_WIDTH, head_dim, scratch, ZEROS, 0,
                scores, column, scores_stride, rows, ahead,
            )  # fmt: skip
        b += ahead


@njit(nogil=True, forceinline=True)
def _weighted_values(
    weights, rows, context, tables, sequence, kv_head, num_kv_heads, head_dim, value_width, kv, out, offsets,
    next_sequence, next_head, next_blocks,
):  # fmt: skip
    """The sum of the values of all blocks, weighted: `out` [rows, value_width]. weights: [positions, rows]."""
    size, keys_size = kv_block_size(head_dim, value_width), PANEL_WIDTH * head_dim
    side_by_side = 4 if rows == 1 else 2 if rows == 2 else 1
    for i in range(rows * value_width):
        out[i] = np.float32(0.0)
    for b in range((context + PANEL_WIDTH - 1) // PANEL_WIDTH):
        depth = min(PANEL_WIDTH, context - b * PANEL_WIDTH)
        block = (tables[sequence, b] * num_kv_heads + kv_head) * size + keys_size
        first = b * PANEL_WIDTH * rows
        column = 0
        while column < value_width:
            ahead = min(side_by_side, (value_width - column) // PANEL_WIDTH)
            for i in range(ahead):
                place = block + column + i * PANEL_WIDTH
                offsets[2 * i], offsets[2 * i + 1] = place, 0
                if b < next_blocks:
                    # NOTE: the columns together prefetch the next block in the order it lies in memory.
                    next_block = (tables[next_sequence, b] * num_kv_heads + next_head) * size + keys_size
                    offsets[2 * i + 1] = next_block + (column + i * PANEL_WIDTH) * depth - place
            if rows > 2 or (rows == 2 and ahead == 1):
                _dot_rows(
                    weights, first, rows, kv, offsets[0], value_width, depth, offsets[1],
                    out, column, value_width, out, column, value_width, rows,
                )  # fmt: skip
            else:
                dot_short(
                    weights, first, rows, kv, offsets, value_width, depth, out, column, value_width,
                    out, column, value_width, rows, ahead,
                )  # fmt: skip
            column += ahead * PANEL_WIDTH


@njit(nogil=True)
def _dot_rows(
    x, x_offset, x_step, w, w_offset, w_stride, depth, fetch, start, start_offset, start_stride,
    out, out_offset, out_stride, rows,
):  # fmt: skip
    """The product of any number of rows with one panel of float32."""
    for r in range(0, rows, TILE_ROWS):
        dot_tile(
            x, x_offset + r, x_step, w, w_offset, w_stride, depth, fetch, _FLOAT_LINE, start,
            start_offset + r * start_stride, start_stride, out, out_offset + r * out_stride, out_stride,
            min(TILE_ROWS, rows - r),
        )  # fmt: skip


@njit(nogil=True, forceinline=True)
def dot_short(
    x, x_offset, x_step, w, offsets, w_stride, depth, start, start_offset, start_stride,
    out, out_offset, out_stride, rows, panels,
):  # fmt: skip
    """The product of one row with up to four panels, or of two rows with two panels."""
    if rows == 2:
        _dot_2x2(
            x, x_offset, x_step, w, offsets, w_stride, depth, 0, _FLOAT_LINE, start, start_offset, start_stride,
            out, out_offset, out_stride, 2,
        )  # fmt: skip
    elif panels == 4:
        _dot_1x4(
            x, x_offset, x_step, w, offsets, w_stride, depth, 0, _FLOAT_LINE, start, start_offset, start_stride,
            out, out_offset, out_stride, 1,
        )  # fmt: skip
    elif panels == 3:
        _dot_1x3(
            x, x_offset, x_step, w, offsets, w_stride, depth, 0, _FLOAT_LINE, start, start_offset, start_stride,
            out, out_offset, out_stride, 1,
        )  # fmt: skip
    elif panels == 2:
        _dot_1x2(
            x, x_offset, x_step, w, offsets, w_stride, depth, 0, _FLOAT_LINE, start, start_offset, start_stride,
            out, out_offset, out_stride, 1,
        )  # fmt: skip
    else:
        _dot_1x1(
            x, x_offset, x_step, w, offsets[0], w_stride, depth, offsets[1], _FLOAT_LINE, start, start_offset,
            start_stride, out, out_offset, out_stride, 1,
        )  # fmt: skip


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
