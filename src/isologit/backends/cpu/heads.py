"""Attention of a step, in one of two ways: item by item after the projection, or head by head together with it.

Attention of single tokens waits for keys and values, a projection waits for its own multiply-adds. Head by head, a
thread does both in turns: while it projects queries, keys and values of its next head, tile by tile, each tile
prefetches keys and values that the attention of the present head will read right after it. A head belongs to one thread
from its projection to its result, so threads do not wait for each other in between, and the head's queries, keys,
values and result stay in a few rows that the near caches keep. That wants many rows, and heads that the threads can
share evenly.
"""

from __future__ import annotations

import numpy as np

from isologit.backends.cpu.kernels import (
    attention_tile,
    even_share,
    head_columns,
    kv_block_size,
    pack_tile,
    rotate_and_cache,
    scale_row,
    tile_count,
)
from isologit.backends.cpu.simd import CACHE_LINE, PANEL_WIDTH, TILE_ROWS, atomic_add, monotonic_ns
from isologit.backends.cpu.tiles import LINES_PER_PASS, STREAM_CHUNK, make_tile_product
from isologit.common.compiler import njit

MAX_CHUNKS = 512  # of a tile's stream
_LEAST_ROWS = 2 * TILE_ROWS  # with fewer, weights are what a projection waits for
_TURNS_PER_SAMPLE = 8  # of which one is timed
_LINES_PER_CHUNK = STREAM_CHUNK // CACHE_LINE

_streaming_tile = make_tile_product(tuple(range(1, TILE_ROWS + 1)), "store", stream=True)


@njit(nogil=True)
def heads_suit(rows, num_kv_heads, head_dim, num_threads):
    """Whether a step of `rows` rows should go head by head."""
    even = num_kv_heads % num_threads == 0 or num_kv_heads >= 4 * num_threads
    return rows >= _LEAST_ROWS and even and head_dim % PANEL_WIDTH == 0


@njit(nogil=True)
def attend(
    qkv, qkv_stride, positions, slots, tiles, items, block_tables, num_heads, num_kv_heads, head_dim, value_width,
    cos, sin, kv, out, out_stride, queries, scores, scores_stride, weights, sums, scratch, offsets,
    counters, counter,
):  # fmt: skip
    """One thread's share of attention: keys and values into the cache, unless written before, and the result in `out`.

    Arguments are those of `rotate_and_cache` and `attention_tile`; tiles and items are as in `AttentionWork`. Threads
    share the items through `counters[counter]`; each takes its next one early, because every tile prefetches what the
    next one reads.
    """
    group = num_heads // num_kv_heads
    item = atomic_add(counters, counter, 1)
    while item < items.shape[0]:
        next_item = atomic_add(counters, counter, 1)
        first_tile, last_tile, first, last = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
        for kv_head in range(first, last):
            queries_column, keys_column, values_column = head_columns(kv_head, group, num_kv_heads, head_dim)
            for tile in range(first_tile, last_tile):
                next_tile, next_head = tile + 1, kv_head
                if next_tile == last_tile:
                    next_tile, next_head = first_tile, kv_head + 1
                if next_head == last and next_item < items.shape[0]:
                    next_tile, next_head = items[next_item, 0], items[next_item, 2]
                first_row, num_rows, first_position = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
                next_context = tiles[next_tile, 1] + tiles[next_tile, 2] if next_head < num_kv_heads else 0
                place = first_row * qkv_stride
                if tiles[tile, 4]:
                    rotate_and_cache(
                        qkv, place + queries_column, place + keys_column, place + values_column, qkv_stride,
                        first_row, num_rows, positions, slots, kv_head, group, num_kv_heads, head_dim, value_width,
                        cos, sin, kv,
                    )  # fmt: skip
                attention_tile(
                    qkv, place + queries_column, qkv_stride, num_rows, first_position, block_tables, tiles[tile, 3],
                    kv_head, group, num_kv_heads, head_dim, value_width, kv, out,
                    first_row * out_stride + queries_column, out_stride, queries, scores, scores_stride, weights,
                    sums, scratch, offsets, tiles[next_tile, 3], next_head, -(-next_context // PANEL_WIDTH),
                )  # fmt: skip
        item = next_item


@njit(nogil=True)
def _panel_of(number, head, num_heads, num_kv_heads, head_dim):
    """The `number`-th panel of a KV head's queries, keys and values; weights are [q heads | k heads | v heads]."""
    each = head_dim // PANEL_WIDTH
    queries = num_heads // num_kv_heads * each
    if number < queries:
        return head * queries + number
    kind, within = divmod(number - queries, each)
    return (num_heads + kind * num_kv_heads + head) * each + within


@njit(nogil=True)
def _list_chunks(chunks, tiles, first, last, block_tables, head, num_kv_heads, head_dim, value_width, kv, most):
    """Addresses of the keys and values of tiles `first` to `last` - 1; returns the number of lines, at most `most`."""
    count = 0
    block_bytes = kv_block_size(head_dim, value_width) * kv.itemsize
    limit = most // _LINES_PER_CHUNK
    for tile in range(first, last):
        sequence = tiles[tile, 3]
        if tile > 0 and tiles[tile - 1, 3] == sequence:
            continue
        context = tiles[tile, 1] + tiles[tile, 2]
        for block in range((context + PANEL_WIDTH - 1) // PANEL_WIDTH):
            place = kv.ctypes.data + (block_tables[sequence, block] * num_kv_heads + head) * block_bytes
            without = max(0, (block + 1) * PANEL_WIDTH - context)  # places that have no token yet
            for part in range(0, block_bytes - without * value_width * kv.itemsize, STREAM_CHUNK):
                if count < limit:
                    chunks[count] = place + part
                    count += 1
    chunks[count] = chunks[max(0, count - 1)]
    return count * _LINES_PER_CHUNK


@njit(nogil=True)
def project_and_attend(
    normed, hidden, rows, panels, bias, bias_step, head_rows, positions, slots, tiles, written_first,
    block_tables, group, num_kv_heads, head_dim, value_width, cos, sin, kv, out, out_stride, pack, queries, scores,
    scores_stride, weights, sums, scratch, offsets, chunks, num_threads, counters, counter,
):  # fmt: skip
    """One thread's share of the heads: projection, keys and values into the cache, and attention into `out`.

    With `pack`, `out` gets tiles of `out_stride` features, as a product reads them, else rows of `out_stride`. Other
    arguments are those of `linear` for the projection, of `rotate_and_cache` and of `attention_tile`; tiles and
    written_first are as in `AttentionWork`. Of this thread: head_rows, float32 [2, rows, group + 2, head_dim], the
    present and the next head, and chunks, MAX_CHUNKS + 1 int64. Threads share the KV heads through
    `counters[counter]`. Returns the nanoseconds spent projecting, from a sample of the tiles.
    """
    flat = panels.reshape(-1)
    panel_size = hidden * PANEL_WIDTH
    num_heads = group * num_kv_heads
    width, keys, values = (group + 2) * head_dim, group * head_dim, (group + 1) * head_dim
    num_panels = width // PANEL_WIDTH
    row_tiles = tile_count(rows)
    units = num_panels * row_tiles
    line = CACHE_LINE // flat.itemsize
    pace = -(-line // row_tiles)
    fetched_by_tile = hidden * PANEL_WIDTH * pace // line
    places = hidden // 2 * LINES_PER_PASS
    most_lines = min(places, MAX_CHUNKS * _LINES_PER_CHUNK)
    spent = 0
    present, upcoming = 0, rows * width  # where the rows of the two heads begin
    head, next_head = -1, atomic_add(counters, counter, 1)  # -1: none yet, so there is only something to project
    while head < num_kv_heads and (head >= 0 or next_head < num_kv_heads):
        num_tiles = tiles.shape[0] if head >= 0 else 0
        projecting = next_head < num_kv_heads
        for sequence in range(written_first.shape[0] if head >= 0 else 0):
            place = present + written_first[sequence, 0] * width
            rotate_and_cache(
                head_rows, place, place + keys, place + values, width, written_first[sequence, 0],
                written_first[sequence, 1], positions, slots, head, group, num_kv_heads, head_dim, value_width,
                cos, sin, kv,
            )  # fmt: skip
        turns = units if projecting else num_tiles
        first = 0
        for turn in range(turns):
            last = (turn + 1) * num_tiles // turns
            if projecting:
                lines = _list_chunks(
                    chunks, tiles, first, last, block_tables, head, num_kv_heads, head_dim, value_width, kv, most_lines
                )  # fmt: skip
                number, row_tile = divmod(turn, row_tiles)
                panel = _panel_of(number, next_head, num_heads, num_kv_heads, head_dim)
                # NOTE: behind a head's last panel comes, most likely, the first one of this thread's next head.
                heads_on, following = divmod(number + 1, num_panels)
                following_head = min(next_head + heads_on * num_threads, num_kv_heads - 1)
                following = _panel_of(following, following_head, num_heads, num_kv_heads, head_dim)
                top, end = even_share(row_tile, row_tiles, rows)
                timed = turn % _TURNS_PER_SAMPLE == 0
                began = monotonic_ns() if timed else 0
                _streaming_tile(
                    normed, top * hidden, end - top, flat, panel * panel_size, PANEL_WIDTH, hidden,
                    (following - panel) * panel_size + row_tile * fetched_by_tile, pace, bias, panel * bias_step, 0,
                    head_rows, upcoming + top * width + number * PANEL_WIDTH, width, chunks,
                    -(-lines * 256 // places), end - top,
                )  # fmt: skip
                if timed:
                    spent += _TURNS_PER_SAMPLE * (monotonic_ns() - began)
            for tile in range(first, last):
                first_row, num_rows, first_position = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
                place = present + first_row * width
                if tiles[tile, 4]:
                    rotate_and_cache(
                        head_rows, place, place + keys, place + values, width, first_row, num_rows, positions, slots,
                        head, group, num_kv_heads, head_dim, value_width, cos, sin, kv,
                    )  # fmt: skip
                next_tile = tile + 1 if tile + 1 < num_tiles else first
                ahead = (tiles[next_tile, 1] + tiles[next_tile, 2] + PANEL_WIDTH - 1) // PANEL_WIDTH
                attention_tile(
                    head_rows, place, width, num_rows, first_position, block_tables, tiles[tile, 3], head, group,
                    num_kv_heads, head_dim, value_width, kv, head_rows, place, width, queries, scores, scores_stride,
                    weights, sums, scratch, offsets, tiles[next_tile, 3], head, ahead,
                )  # fmt: skip
            first = last
        if head >= 0:
            column, size = head * group * head_dim, group * head_dim
            for row_tile in range(row_tiles):
                top, end = even_share(row_tile, row_tiles, rows)
                if pack:
                    target = top * out_stride + column * (end - top)
                    pack_tile(head_rows, present + top * width, width, end - top, size, out, target, end - top)
                    continue
                for r in range(top, end):
                    scale_row(head_rows, present + r * width, np.float32(1.0), out, r * out_stride + column, size)
        head, present, upcoming = next_head, upcoming, present
        if head < num_kv_heads:
            next_head = atomic_add(counters, counter, 1)
    return spent
