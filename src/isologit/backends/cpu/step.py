"""A LLaMA step as compiled functions, each run by every thread together: which kernel comes after which.

Threads that share a step meet at a spin barrier between operations, so a step costs one dispatch however many
operations it has. A thread with a part of its own meets nobody before `choose_rows`.
"""

from __future__ import annotations

from isologit.backends.cpu.arguments import ChoiceScratch, Head, Scratch, Shape, Weights, Work
from isologit.backends.cpu.heads import attend, heads_suit, project_and_attend
from isologit.backends.cpu.kernels import (
    ADD,
    COUNTER_STRIDE,
    STORE,
    SWIGLU,
    ZEROS,
    argmax_row,
    barrier,
    even_share,
    head_columns,
    linear,
    log_normaliser_row,
    pack_tile,
    rms_norm_row,
    rms_norm_tile,
    rotate_and_cache,
    tile_count,
    wait_until,
)
from isologit.backends.cpu.shortlist import NOT_PICKED, bound_panels, pick_row, quantise_row
from isologit.backends.cpu.simd import WORDS_OF_FOUR, atomic_add, monotonic_ns
from isologit.common.compiler import VECTOR_WIDTH, njit

COUNTERS_PER_LAYER = 5  # operations that share work through a counter: qkv, attention, output, gate-up, down
COUNTERS_PER_PART = 4  # in `choose_rows`: whether it is ready, panels, threads that are busy with them, rows

# What the step's time is counted under, in the order of `CPUBackend.phases`.
PHASES = ("elementwise", "qkv", "attention", "output", "gate_up", "down", "head", "argmax", "wait")
_ELEMENTWISE, _QKV, _ATTENTION, _OUTPUT, _GATE_UP, _DOWN, _HEAD, _ARGMAX, _WAIT = range(len(PHASES))


@njit(nogil=True)
def _count(thread, clock, phase):
    """Add the time since the last call to `clock[phase]`; thread 0 keeps the clock, `clock[-1]` is the last call."""
    if thread == 0:
        now = monotonic_ns()
        clock[phase] += now - clock[-1]
        clock[-1] = now


@njit(nogil=True)
def _norm_rows(thread, num_threads, source, stride, rows, weight, size, eps, out, places, scales, scratch):
    """Norm of `rows` rows; a thread takes whole tiles."""
    tiles = tile_count(rows)
    for tile in range(thread, tiles, num_threads):
        top, end = even_share(tile, tiles, rows)
        for r in range(end - top):
            places[r] = (top + r) * stride
        rms_norm_tile(source, places, end - top, weight, size, eps, out, top * size, scales, scratch)


@njit(nogil=True, cache=True)
def run_step(thread, num_threads, part, shape, weights, work, scratch, kv, clock):
    """Forward pass of one part of a step by `num_threads` threads; with one part, it is all of the step.

    Fills the part's rows of `scratch.final` [R, hidden], what the LM head reads. shape, weights, work and scratch:
    plain tuples of the fields of `arguments`. kv: float32 [layers, -1]. clock: int64 [len(PHASES) + 1], nanoseconds of
    the part's first thread.
    """
    shape, weights, work, scratch = Shape(*shape), Weights(*weights), Work(*work), Scratch(*scratch)
    num_kv_heads, head_dim, hidden = shape.num_kv_heads, shape.head_dim, shape.hidden
    value_width, eps = shape.value_width, shape.eps
    group, heads_size = shape.num_heads // num_kv_heads, shape.num_heads * head_dim
    positions, slots, block_tables, logits_rows = work.positions, work.slots, work.block_tables, work.logits_rows
    tiles, items, written_first = work.tiles, work.items, work.written_first
    rows, num_logits = work.token_ids.shape[0], logits_rows.shape[0]
    row_tiles = tile_count(rows)
    gated_features = weights.gate_up.shape[1] * VECTOR_WIDTH
    first_row = work.first_row
    residual = scratch.residual[first_row : first_row + rows]
    attended = scratch.attended[first_row : first_row + rows]
    kept_residual = scratch.kept_residual[first_row : first_row + rows]
    kept_attended = scratch.kept_attended[first_row : first_row + rows]
    final_flat = scratch.final[work.first_logit : work.first_logit + num_logits].reshape(-1)
    normed, packed = scratch.normed[first_row * hidden :], scratch.packed[first_row * heads_size :]
    gated = scratch.gated[first_row * gated_features :]
    stride, qkv_stride = residual.shape[1], scratch.qkv.shape[1]
    residual_flat, attended_flat = residual.reshape(-1), attended.reshape(-1)
    qkv_flat = scratch.qkv[first_row : first_row + rows].reshape(-1)
    own = part + thread  # of what each thread has for itself
    rows_scratch, offsets = scratch.rows[own], scratch.offsets[own]
    queries, sums = scratch.queries[own], scratch.sums[own]
    scores, softmaxed, scores_stride = scratch.scores[own].reshape(-1), scratch.weights[own], scratch.scores.shape[2]
    cos, sin = weights.cos, weights.sin
    counters = work.counters
    counter = COUNTER_STRIDE  # NOTE: the first one is the barrier's
    if thread == 0:
        clock[-1] = monotonic_ns()
    for tile in range(thread, row_tiles, num_threads):
        top, end = even_share(tile, row_tiles, rows)
        for r in range(top, end):
            for i in range(hidden):
                residual[r, i] = weights.embedding[work.token_ids[r], i]
    last_layer = weights.qkv.shape[0] - 1
    by_head = heads_suit(rows, num_kv_heads, head_dim, num_threads)
    for layer in range(last_layer + 1):
        # NOTE: tiles are dealt to threads in the same way above and in the norm, so no barrier is needed between.
        if layer > 0:
            barrier(counters, num_threads)
            _count(thread, clock, _DOWN)
        _norm_rows(
            thread, num_threads, residual_flat, stride, rows, weights.input_norms[layer], hidden, eps,
            normed, offsets, sums, rows_scratch,
        )  # fmt: skip
        barrier(counters, num_threads)
        _count(thread, clock, _ELEMENTWISE)
        layer_kv = kv[layer]
        if layer == last_layer:
            tiles, items, written_first = work.last_tiles, work.last_items, work.last_written_first
        projecting = 0
        fewer = layer == last_layer and num_logits < rows
        if by_head:
            head_results = attended_flat if fewer else packed
            projecting = project_and_attend(
                normed, hidden, rows, weights.qkv[layer], weights.qkv_bias[layer], shape.qkv_bias_step,
                scratch.head_rows[own], positions, slots, tiles, written_first, block_tables, group, num_kv_heads,
                head_dim, value_width, cos, sin, layer_kv, head_results, heads_size, not fewer, queries, scores,
                scores_stride, softmaxed, sums, rows_scratch, offsets, scratch.chunks[own], num_threads, counters,
                counter,
            )  # fmt: skip
        else:
            linear(
                normed, hidden, rows, hidden, weights.qkv[layer], weights.qkv_bias[layer],
                shape.qkv_bias_step, qkv_flat, qkv_stride, STORE, rows_scratch, offsets, counters, counter,
            )  # fmt: skip
            counter += COUNTER_STRIDE
            barrier(counters, num_threads)
            _count(thread, clock, _QKV)
            # NOTE: keys and values are written just before they are first read, when the cache line is there already.
            # Only tokens that other tiles look back to must be written by all before any goes on.
            if written_first.shape[0]:
                first, last = even_share(thread, num_threads, num_kv_heads)
                for sequence in range(written_first.shape[0]):
                    place = written_first[sequence, 0] * qkv_stride
                    for head in range(first, last):
                        column, key_column, value_column = head_columns(head, group, num_kv_heads, head_dim)
                        rotate_and_cache(
                            qkv_flat, place + column, place + key_column, place + value_column, qkv_stride,
                            written_first[sequence, 0], written_first[sequence, 1], positions, slots, head, group,
                            num_kv_heads, head_dim, value_width, cos, sin, layer_kv,
                        )  # fmt: skip
                barrier(counters, num_threads)
                _count(thread, clock, _ELEMENTWISE)
            attend(
                qkv_flat, qkv_stride, positions, slots, tiles, items, block_tables, shape.num_heads, num_kv_heads,
                head_dim, value_width, cos, sin, layer_kv, attended_flat, heads_size, queries, scores,
                scores_stride, softmaxed, sums, rows_scratch, offsets, counters, counter,
            )  # fmt: skip
        counter += COUNTER_STRIDE
        barrier(counters, num_threads)
        _count(thread, clock, _ATTENTION)
        if thread == 0:
            clock[_ATTENTION] -= projecting
            clock[_QKV] += projecting
        # NOTE: tiles are dealt to threads in the same way twice, so no barrier is needed between.
        if fewer:
            rows, row_tiles = num_logits, tile_count(num_logits)
            for tile in range(thread, row_tiles, num_threads):
                top, end = even_share(tile, row_tiles, rows)
                for r in range(top, end):
                    for i in range(hidden):
                        kept_residual[r, i] = residual[logits_rows[r], i]
                    for i in range(heads_size):
                        kept_attended[r, i] = attended[logits_rows[r], i]
            residual_flat, attended_flat = kept_residual.reshape(-1), kept_attended.reshape(-1)
        if fewer or not by_head:
            for tile in range(thread, row_tiles, num_threads):
                top, end = even_share(tile, row_tiles, rows)
                pack_tile(
                    attended_flat, top * heads_size, heads_size, end - top, heads_size,
                    packed, top * heads_size, end - top,
                )  # fmt: skip
            barrier(counters, num_threads)
            _count(thread, clock, _ELEMENTWISE)
        linear(
            packed, heads_size, rows, heads_size, weights.out[layer], weights.out_bias[layer],
            shape.out_bias_step, residual_flat, stride, ADD, rows_scratch, offsets, counters, counter,
        )  # fmt: skip
        counter += COUNTER_STRIDE
        barrier(counters, num_threads)
        _count(thread, clock, _OUTPUT)
        _norm_rows(
            thread, num_threads, residual_flat, stride, rows, weights.post_norms[layer], hidden, eps,
            normed, offsets, sums, rows_scratch,
        )  # fmt: skip
        barrier(counters, num_threads)
        _count(thread, clock, _ELEMENTWISE)
        linear(
            normed, hidden, rows, hidden, weights.gate_up[layer], weights.gate_up_bias[layer],
            shape.gate_up_bias_step, gated, gated_features, SWIGLU, rows_scratch, offsets, counters, counter,
        )  # fmt: skip
        counter += COUNTER_STRIDE
        barrier(counters, num_threads)
        _count(thread, clock, _GATE_UP)
        linear(
            gated, gated_features, rows, shape.intermediate, weights.down[layer], weights.down_bias[layer],
            shape.down_bias_step, residual_flat, stride, ADD, rows_scratch, offsets, counters, counter,
        )  # fmt: skip
        counter += COUNTER_STRIDE
    barrier(counters, num_threads)
    _count(thread, clock, _DOWN)
    for r in range(thread, rows, num_threads):
        rms_norm_row(residual_flat, r * stride, weights.final_norm, hidden, eps, final_flat, r * hidden)
    barrier(counters, num_threads)
    _count(thread, clock, _ELEMENTWISE)


@njit(nogil=True, cache=True)
def choose_rows(
    thread, num_threads, shared, clock, picked, first_picked, vocab, head, scratch, choice, chosen,
):  # fmt: skip
    """Index of the largest logit of some rows of `scratch.final` [R, hidden], without all their logits, or NOT_PICKED.

    picked: int64 [P], ascending, those rows; their indices go to the same places of `chosen` [R]. first_picked: int64
    [parts + 1], where the rows of each part of the step begin among them. Part i is ready when thread i comes here. A
    thread begins with its own part and then helps with the others, so that little waits for a late one. shared: int64,
    zero at first, a line for the barrier, COUNTERS_PER_PART for each part, and one that counts the panels computed.
    head, scratch and choice: plain tuples of the fields of `arguments`.
    """
    head, scratch, choice = Head(*head), Scratch(*scratch), ChoiceScratch(*choice)
    hidden, num_panels, num_parts = scratch.final.shape[1], head.panels.shape[0], first_picked.shape[0] - 1
    flat = scratch.final.reshape(-1)
    panels_computed = COUNTER_STRIDE * (1 + COUNTERS_PER_PART * num_parts)
    if thread == 0:
        clock[-1] = monotonic_ns()
    for turn in range(num_parts):
        part = (thread + turn) % num_parts
        first, last = first_picked[part], first_picked[part + 1]
        rows, tiles = last - first, tile_count(last - first)
        part_picked = picked[first:last]
        part_integers = choice.row_integers[first * hidden :]
        part_words = choice.row_words[first * hidden // 4 * WORDS_OF_FOUR :]
        part_take, part_factors = choice.rows_to_take[first:last], choice.factors[first:last]
        part_tops = choice.tops[first * num_panels : last * num_panels]
        ready = COUNTER_STRIDE * (1 + COUNTERS_PER_PART * part)
        panel, busy, row = ready + COUNTER_STRIDE, ready + 2 * COUNTER_STRIDE, ready + 3 * COUNTER_STRIDE
        if thread == part:
            for tile in range(tiles):
                top, end = even_share(tile, tiles, rows)
                for r in range(top, end):
                    place = (top * hidden // 4 + (r - top)) * 4
                    chosen[part_picked[r]] = 0
                    if not quantise_row(
                        flat, part_picked[r] * hidden, hidden, part_integers, place, end - top, part_take,
                        part_factors, r,
                    ):  # fmt: skip
                        chosen[part_picked[r]] = NOT_PICKED
            atomic_add(shared, ready, 1)
            _count(thread, clock, _ELEMENTWISE)
        else:
            wait_until(shared, ready, 1)
            _count(thread, clock, _WAIT)
        atomic_add(shared, busy, 1)
        bound_panels(
            part_words, rows, head.byte_weights, head.byte_columns, part_take, part_factors, part_tops, shared,
            panel,
        )  # fmt: skip
        # NOTE: whoever comes here now finds no panel left, so the bounds are complete when nobody is busy.
        atomic_add(shared, busy, -1)
        _count(thread, clock, _HEAD)
        wait_until(shared, busy, 0)
        _count(thread, clock, _WAIT)
        r = atomic_add(shared, row, 1)
        while r < rows:
            if chosen[part_picked[r]] != NOT_PICKED:
                chosen[part_picked[r]], panels = pick_row(
                    flat, part_picked[r] * hidden, r, rows, head.panels, vocab, part_tops,
                    choice.row_tops[thread], scratch.rows[thread], ZEROS, scratch.offsets[thread],
                )  # fmt: skip
                atomic_add(shared, panels_computed, panels)
            r = atomic_add(shared, row, 1)
        _count(thread, clock, _ARGMAX)
    barrier(shared, num_threads)
    _count(thread, clock, _WAIT)


@njit(nogil=True, cache=True)
def meet(thread, num_threads, sync, clock):
    """What ends the work of threads that each computed a part."""
    if thread == 0:
        clock[-1] = monotonic_ns()
    barrier(sync, num_threads)
    _count(thread, clock, _WAIT)


@njit(nogil=True, cache=True)
def project_rows(thread, num_threads, counters, final, head_panels, vocab, scratch, logits, chosen, clock):
    """Logits [R, padded vocab] of rows of `final` [R, hidden], and the index of the largest in each.

    scratch: a plain tuple of its fields.
    """
    scratch = Scratch(*scratch)
    rows, hidden = final.shape
    tiles = tile_count(rows)
    final_flat, logits_flat = final.reshape(-1), logits.reshape(-1)
    normed = scratch.normed
    if thread == 0:
        clock[-1] = monotonic_ns()
    for tile in range(thread, tiles, num_threads):
        top, end = even_share(tile, tiles, rows)
        pack_tile(final_flat, top * hidden, hidden, end - top, hidden, normed, top * hidden, end - top)
    barrier(counters, num_threads)
    _count(thread, clock, _ELEMENTWISE)
    linear(
        normed, hidden, rows, hidden, head_panels, scratch.rows[thread][ZEROS:], 0, logits_flat,
        logits.shape[1], STORE, scratch.rows[thread], scratch.offsets[thread], counters, COUNTER_STRIDE,
    )  # fmt: skip
    barrier(counters, num_threads)
    _count(thread, clock, _HEAD)
    for i in range(thread, rows, num_threads):
        chosen[i] = argmax_row(logits_flat, i * logits.shape[1], vocab)
    barrier(counters, num_threads)
    _count(thread, clock, _ARGMAX)


@njit(nogil=True, cache=True)
def normalise_rows(thread, num_threads, sync, logits, vocab, out):
    """The normaliser of each row of `logits` [R, padded vocab], by `num_threads` threads."""
    flat = logits.reshape(-1)
    for i in range(thread, out.shape[0], num_threads):
        out[i] = log_normaliser_row(flat, i * logits.shape[1], vocab)
    barrier(sync, num_threads)
