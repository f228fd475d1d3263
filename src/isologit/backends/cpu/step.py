"""A LLaMA step as compiled functions, each run by every thread together: which kernel comes after which.

Threads that share a step meet at a spin barrier between operations, so a step costs one dispatch however many
operations it has. A thread with a part of its own meets nobody before `choose_rows`.
"""

from __future__ import annotations

from numba import njit

from isologit.backends.cpu.heads import attend, heads_suit, project_and_attend
from isologit.backends.cpu.kernels import (
    ADD,
    COUNTER_STRIDE,
    STORE,
    SWIGLU,
    ZEROS,
    argmax_row,
    barrier,
    head_columns,
    linear,
    log_normaliser_row,
    pack_tile,
    rms_norm_row,
    rms_norm_tile,
    rotate_and_cache,
    tile_height,
    wait_until,
)
from isologit.backends.cpu.shortlist import NOT_PICKED, bound_panels, pick_row, quantise_row
from isologit.backends.cpu.simd import TILE_ROWS, VECTOR_WIDTH, atomic_add, monotonic_ns

COUNTERS_PER_LAYER = 5  # operations that share work through a counter: qkv, attention, output, gate-up, down
COUNTERS_PER_PART = 4  # in `choose_rows`: whether it is ready, panels, threads that are busy with them, rows

# What the step's time is booked under, in the order of `CPUBackend.phases`.
PHASES = ("elementwise", "qkv", "attention", "output", "gate_up", "down", "head", "argmax")
_ELEMENTWISE, _QKV, _ATTENTION, _OUTPUT, _GATE_UP, _DOWN, _HEAD, _ARGMAX = range(len(PHASES))


@njit(nogil=True)
def _book(thread, clock, phase):
    """Add the time since the last call to `clock[phase]`; thread 0 keeps the books, `clock[-1]` is the last call."""
    if thread == 0:
        now = monotonic_ns()
        clock[phase] += now - clock[-1]
        clock[-1] = now


@njit(nogil=True)
def _norm_rows(thread, num_threads, source, stride, rows, gain, size, eps, out, height, places, scales, scratch):
    """Norm of `rows` rows; a thread takes whole tiles."""
    for top in range(thread * height, rows, num_threads * height):
        n = min(height, rows - top)
        for r in range(n):
            places[r] = (top + r) * stride
        rms_norm_tile(source, places, n, gain, size, eps, out, top * size, height, scales, scratch)


@njit(nogil=True)
def _share(part, num_parts, count):
    """First and last + 1 of the part's even share of `count`."""
    return part * count // num_parts, (part + 1) * count // num_parts


@njit(nogil=True, cache=True)
def run_step(
    thread, num_threads, sync, counters,
    token_ids, positions, slots, tiles, items, written_first, last_tiles, last_items, last_written_first,
    block_tables, logits_rows,
    embedding, input_gains, post_gains, final_gain, w_qkv, w_out, w_gate_up, w_down,
    num_heads, num_kv_heads, head_dim, hidden, intermediate, value_width, eps, cos, sin, kv,
    residual, normed, qkv, attended, packed, gated, kept_residual, kept_attended,
    query_scratch, score_scratch, weight_scratch, sum_scratch, row_scratch, offset_scratch,
    chunk_scratch, head_scratch, final, clock,
):  # fmt: skip
    """Forward pass of T flat tokens by `num_threads` threads. Fills `final` [R, hidden], what the last product reads.

    tiles, items, written_first: the attention's work as `attention_work` gives it. In the last layer only the
    rows in `logits_rows` go on: last_* is that layer's work, kept_* hold its rows.
    """
    rows, num_logits = token_ids.shape[0], logits_rows.shape[0]
    height = tile_height(rows)
    stride, qkv_stride, heads_size = residual.shape[1], qkv.shape[1], num_heads * head_dim
    gated_features = w_gate_up.shape[1] * VECTOR_WIDTH
    residual_flat, qkv_flat, attended_flat = residual.reshape(-1), qkv.reshape(-1), attended.reshape(-1)
    scratch, offsets = row_scratch[thread], offset_scratch[thread]
    queries, sums = query_scratch[thread], sum_scratch[thread]
    scores, weights = score_scratch[thread].reshape(-1), weight_scratch[thread]
    scores_stride = score_scratch.shape[2]
    group = num_heads // num_kv_heads
    counter = 0
    if thread == 0:
        clock[-1] = monotonic_ns()
    for top in range(thread * height, rows, num_threads * height):
        for r in range(top, min(rows, top + height)):
            for i in range(hidden):
                residual[r, i] = embedding[token_ids[r], i]
    last_layer = w_qkv.shape[0] - 1
    by_head = heads_suit(rows, num_kv_heads, head_dim, num_threads)
    for layer in range(last_layer + 1):
        # NOTE: tiles are dealt to threads in the same way above and in the norm, so no barrier is needed between.
        if layer > 0:
            barrier(sync, num_threads)
            _book(thread, clock, _DOWN)
        _norm_rows(
            thread, num_threads, residual_flat, stride, rows, input_gains[layer], hidden, eps,
            normed, height, offsets, sums, scratch,
        )  # fmt: skip
        barrier(sync, num_threads)
        _book(thread, clock, _ELEMENTWISE)
        layer_kv = kv[layer]
        if layer == last_layer:
            tiles, items, written_first = last_tiles, last_items, last_written_first
        projecting = 0
        fewer = layer == last_layer and num_logits < rows
        if by_head:
            head_results = attended_flat if fewer else packed
            projecting = project_and_attend(
                normed, height, hidden, rows, w_qkv[layer], head_scratch[thread], positions, slots, tiles,
                written_first, block_tables, group, num_kv_heads, head_dim, value_width, cos, sin, layer_kv,
                head_results, heads_size, not fewer, queries, scores, scores_stride, weights,
                sums, scratch, offsets, chunk_scratch[thread], num_threads, counters, counter,
            )  # fmt: skip
        else:
            linear(
                normed, height, hidden, rows, hidden, w_qkv[layer], qkv_flat, qkv_stride, STORE,
                scratch, offsets, counters, counter,
            )  # fmt: skip
            counter += COUNTER_STRIDE
            barrier(sync, num_threads)
            _book(thread, clock, _QKV)
            # NOTE: keys and values are written just before they are first read, when the cache line is there already.
            # Only tokens that other tiles look back to must be written by all before any goes on.
            if written_first.shape[0]:
                first, last = _share(thread, num_threads, num_kv_heads)
                for sequence in range(written_first.shape[0]):
                    place = written_first[sequence, 0] * qkv_stride
                    for head in range(first, last):
                        column, key_column, value_column = head_columns(head, group, num_kv_heads, head_dim)
                        rotate_and_cache(
                            qkv_flat, place + column, place + key_column, place + value_column, qkv_stride,
                            written_first[sequence, 0], written_first[sequence, 1], positions, slots, head, group,
                            num_kv_heads, head_dim, value_width, cos, sin, layer_kv,
                        )  # fmt: skip
                barrier(sync, num_threads)
                _book(thread, clock, _ELEMENTWISE)
            attend(
                qkv_flat, qkv_stride, positions, slots, tiles, items, block_tables, num_heads, num_kv_heads, head_dim,
                value_width, cos, sin, layer_kv, attended_flat, heads_size, queries, scores,
                scores_stride, weights, sums, scratch, offsets, counters, counter,
            )  # fmt: skip
        counter += COUNTER_STRIDE
        barrier(sync, num_threads)
        _book(thread, clock, _ATTENTION)
        if thread == 0:
            clock[_ATTENTION] -= projecting
            clock[_QKV] += projecting
        # NOTE: tiles are dealt to threads in the same way twice, so no barrier is needed between.
        if fewer:
            rows, height = num_logits, tile_height(num_logits)
            for top in range(thread * height, rows, num_threads * height):
                for r in range(top, min(rows, top + height)):
                    for i in range(hidden):
                        kept_residual[r, i] = residual[logits_rows[r], i]
                    for i in range(heads_size):
                        kept_attended[r, i] = attended[logits_rows[r], i]
            residual_flat, attended_flat = kept_residual.reshape(-1), kept_attended.reshape(-1)
        if fewer or not by_head:
            for top in range(thread * height, rows, num_threads * height):
                pack_tile(
                    attended_flat, top * heads_size, heads_size, min(height, rows - top), heads_size,
                    packed, top * heads_size, height,
                )  # fmt: skip
            barrier(sync, num_threads)
            _book(thread, clock, _ELEMENTWISE)
        linear(
            packed, height, heads_size, rows, heads_size, w_out[layer], residual_flat, stride, ADD,
            scratch, offsets, counters, counter,
        )  # fmt: skip
        counter += COUNTER_STRIDE
        barrier(sync, num_threads)
        _book(thread, clock, _OUTPUT)
        _norm_rows(
            thread, num_threads, residual_flat, stride, rows, post_gains[layer], hidden, eps,
            normed, height, offsets, sums, scratch,
        )  # fmt: skip
        barrier(sync, num_threads)
        _book(thread, clock, _ELEMENTWISE)
        linear(
            normed, height, hidden, rows, hidden, w_gate_up[layer], gated, gated_features, SWIGLU,
            scratch, offsets, counters, counter,
        )  # fmt: skip
        counter += COUNTER_STRIDE
        barrier(sync, num_threads)
        _book(thread, clock, _GATE_UP)
        linear(
            gated, height, gated_features, rows, intermediate, w_down[layer], residual_flat, stride, ADD,
            scratch, offsets, counters, counter,
        )  # fmt: skip
        counter += COUNTER_STRIDE
    barrier(sync, num_threads)
    _book(thread, clock, _DOWN)
    final_flat = final.reshape(-1)
    for r in range(thread, rows, num_threads):
        rms_norm_row(residual_flat, r * stride, final_gain, hidden, eps, final_flat, r * hidden)
    barrier(sync, num_threads)
    _book(thread, clock, _ELEMENTWISE)


@njit(nogil=True, cache=True)
def choose_rows(
    thread, num_threads, sync, counters, picked, first_picked, final, w_head, vocab, byte_weights, byte_columns, bytes_,
    byte_words, rows_to_take, factors, tops, row_tops, row_scratch, offset_scratch, chosen, clock,
):  # fmt: skip
    """Index of the largest logit of some rows of `final` [R, hidden], without all their logits, or NOT_PICKED.

    picked: int64 [P], ascending, those rows; their indices go to the same places of `chosen` [R]. first_picked: int64
    [parts + 1], where the rows of each part of the step begin among them. Part i is ready when thread i comes
    here. A thread begins with its own part and then helps with the others, so that little waits for a late one.
    """
    hidden, num_panels, num_parts = final.shape[1], w_head.shape[0], first_picked.shape[0] - 1
    flat = final.reshape(-1)
    if thread == 0:
        clock[-1] = monotonic_ns()
    for turn in range(num_parts):
        part = (thread + turn) % num_parts
        first, last = first_picked[part], first_picked[part + 1]
        rows, height = last - first, tile_height(last - first)
        part_picked = picked[first:last]
        part_bytes = bytes_[(first + part * TILE_ROWS) * hidden :]
        part_words = byte_words[(first + part * TILE_ROWS) * hidden // 4 :]
        part_take, part_factors = rows_to_take[first:last], factors[first:last]
        part_tops = tops[first * num_panels : last * num_panels]
        ready = COUNTERS_PER_PART * COUNTER_STRIDE * part
        panel, busy, row = ready + COUNTER_STRIDE, ready + 2 * COUNTER_STRIDE, ready + 3 * COUNTER_STRIDE
        if thread == part:
            for top in range(0, rows, height):
                for r in range(top, min(rows, top + height)):
                    place = (top * hidden // 4 + (r - top)) * 4
                    chosen[part_picked[r]] = 0
                    if not quantise_row(
                        flat, part_picked[r] * hidden, hidden, part_bytes, place, height, part_take, part_factors, r
                    ):
                        chosen[part_picked[r]] = NOT_PICKED
            atomic_add(counters, ready, 1)
            _book(thread, clock, _ELEMENTWISE)
        else:
            wait_until(counters, ready, 1)
        atomic_add(counters, busy, 1)
        bound_panels(
            part_words, height, rows, byte_weights, byte_columns, part_take, part_factors, part_tops, counters, panel
        )
        # NOTE: whoever comes here now finds no panel left, so the bounds are complete when nobody is busy.
        atomic_add(counters, busy, -1)
        wait_until(counters, busy, 0)
        _book(thread, clock, _HEAD)
        r = atomic_add(counters, row, 1)
        while r < rows:
            if chosen[part_picked[r]] != NOT_PICKED:
                chosen[part_picked[r]], panels = pick_row(
                    flat, part_picked[r] * hidden, r, rows, w_head, vocab, part_tops, row_tops[thread],
                    row_scratch[thread], ZEROS, offset_scratch[thread],
                )  # fmt: skip
                atomic_add(counters, COUNTERS_PER_PART * COUNTER_STRIDE * num_parts, panels)
            r = atomic_add(counters, row, 1)
        _book(thread, clock, _ARGMAX)
    barrier(sync, num_threads)
    _book(thread, clock, _ARGMAX)


@njit(nogil=True, cache=True)
def meet(thread, num_threads, sync):
    """What ends the work of threads that each computed a part."""
    barrier(sync, num_threads)


@njit(nogil=True, cache=True)
def project_rows(
    thread, num_threads, sync, counters, final, w_head, vocab, normed, row_scratch, offset_scratch, logits, chosen,
    clock,
):  # fmt: skip
    """Logits [R, padded vocab] of rows of `final` [R, hidden], and the index of the largest in each."""
    rows, hidden = final.shape
    height = tile_height(rows)
    final_flat, logits_flat = final.reshape(-1), logits.reshape(-1)
    if thread == 0:
        clock[-1] = monotonic_ns()
    for top in range(thread * height, rows, num_threads * height):
        pack_tile(final_flat, top * hidden, hidden, min(height, rows - top), hidden, normed, top * hidden, height)
    barrier(sync, num_threads)
    _book(thread, clock, _ELEMENTWISE)
    linear(
        normed, height, hidden, rows, hidden, w_head, logits_flat, logits.shape[1], STORE,
        row_scratch[thread], offset_scratch[thread], counters, 0,
    )  # fmt: skip
    barrier(sync, num_threads)
    _book(thread, clock, _HEAD)
    for i in range(thread, rows, num_threads):
        chosen[i] = argmax_row(logits_flat, i * logits.shape[1], vocab)
    barrier(sync, num_threads)
    _book(thread, clock, _ARGMAX)


@njit(nogil=True, cache=True)
def normalise_rows(thread, num_threads, sync, logits, vocab, out):
    """The normaliser of each row of `logits` [R, padded vocab], by `num_threads` threads."""
    flat = logits.reshape(-1)
    for i in range(thread, out.shape[0], num_threads):
        out[i] = log_normaliser_row(flat, i * logits.shape[1], vocab)
    barrier(sync, num_threads)
