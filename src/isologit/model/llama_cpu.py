"""LLaMA on the CPU: one compiled function per step, run by every thread together.

Owns packed weights, the paged KV cache and the step's buffers. It does not know requests: it sees a `FlatBatch`.
The threads meet at a spin barrier between operations, so a step costs one dispatch however many operations it has, and
no other thread pool is involved.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numba import njit

from isologit.config import ModelConfig
from isologit.errors import ModelError
from isologit.model.batch import FlatBatch, StepOutput
from isologit.model.rope import rope_inv_freq
from isologit.ops.cpu import (
    ADD,
    COUNTER_STRIDE,
    SCRATCH_SIZE,
    STORE,
    SWIGLU,
    ZEROS,
    argmax_row,
    barrier,
    interleave_gate_up,
    linear,
    log_normaliser_row,
    pack_tile,
    pack_weight,
    panel_count,
    rms_norm_row,
    rms_norm_tile,
    rotate_and_cache,
    tile_height,
    wait_until,
)
from isologit.ops.heads import MAX_CHUNKS, attend, heads_suit, project_and_attend
from isologit.ops.memory import aligned, zeros
from isologit.ops.shortlist import NOT_PICKED, bound_panels, pack_byte_head, pick_row, quantise_row
from isologit.ops.simd import HAS_BYTE_PRODUCTS, PANEL_WIDTH, TILE_ROWS, VECTOR_WIDTH, atomic_add, monotonic_ns

_LONGEST_GOODBYE_S = 5.0  # for a thread that is still in a step
_PAYING_PANELS = 20  # computed for each row, and a quarter of all once: so many cost less than the whole product
_PAUSE_STEPS = 64  # without bounds after a step that computed more
_COUNTERS_PER_PART = 4  # in `_choose`: whether it is ready, panels, threads that are busy with them, rows
_LEAST_ROWS_APART = 2 * TILE_ROWS  # of a thread's own part of a step: with fewer, weights are what it waits for
_FLOP_PER_BYTE = 5.0  # what a thread computes in the time in which it reads a byte of keys or values
_COUNTERS_PER_LAYER = 5  # operations that share work through a counter: qkv, attention, output, gate-up, down

# What the step's time is booked under, in the order of `LlamaCPU.phase_ns`.
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
def _step(
    thread, num_threads, sync, counters,
    token_ids, positions, slots, tiles, items, written_first, last_tiles, last_items, last_written_first,
    block_tables, logits_rows,
    embedding, input_gains, post_gains, final_gain, w_qkv, w_out, w_gate_up, w_down,
    num_heads, num_kv_heads, head_dim, hidden, intermediate, value_width, eps, cos, sin, keys, values,
    residual, normed, qkv, attended, packed, gated, kept_residual, kept_attended,
    query_scratch, score_scratch, weight_scratch, sum_scratch, row_scratch, offset_scratch,
    chunk_scratch, final, clock,
):  # fmt: skip
    """Forward pass of T flat tokens by `num_threads` threads. Fills `final` [R, hidden], what the last product reads.

    tiles, items, written_first: the attention's work as `FlatBatch.attention_work` gives it. In the last layer only the
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
        layer_keys, layer_values = keys[layer], values[layer]
        if layer == last_layer:
            tiles, items, written_first = last_tiles, last_items, last_written_first
        projecting = 0
        if by_head:
            projecting = project_and_attend(
                normed, height, hidden, rows, w_qkv[layer], qkv_flat, qkv_stride, positions, slots, tiles,
                written_first, block_tables, num_heads, num_kv_heads, head_dim, value_width, cos, sin, layer_keys,
                layer_values, attended_flat, heads_size, queries, scores, scores_stride, weights, sums, scratch,
                offsets, chunk_scratch[thread], counters, counter,
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
                    rotate_and_cache(
                        qkv_flat, qkv_stride, written_first[sequence, 0], written_first[sequence, 1], positions, slots,
                        first, last, num_heads, num_kv_heads, head_dim, value_width, cos, sin, layer_keys, layer_values,
                    )  # fmt: skip
                barrier(sync, num_threads)
                _book(thread, clock, _ELEMENTWISE)
            attend(
                qkv_flat, qkv_stride, positions, slots, tiles, items, block_tables, num_heads, num_kv_heads, head_dim,
                value_width, cos, sin, layer_keys, layer_values, attended_flat, heads_size, queries, scores,
                scores_stride, weights, sums, scratch, offsets, counters, counter,
            )  # fmt: skip
        counter += COUNTER_STRIDE
        barrier(sync, num_threads)
        _book(thread, clock, _ATTENTION)
        if thread == 0:
            clock[_ATTENTION] -= projecting
            clock[_QKV] += projecting
        # NOTE: tiles are dealt to threads in the same way twice, so no barrier is needed between.
        if layer == last_layer and num_logits < rows:
            rows, height = num_logits, tile_height(num_logits)
            for top in range(thread * height, rows, num_threads * height):
                for r in range(top, min(rows, top + height)):
                    for i in range(hidden):
                        kept_residual[r, i] = residual[logits_rows[r], i]
                    for i in range(heads_size):
                        kept_attended[r, i] = attended[logits_rows[r], i]
            residual_flat, attended_flat = kept_residual.reshape(-1), kept_attended.reshape(-1)
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
def _choose(
    thread, num_threads, sync, counters, first_rows, final, w_head, vocab, byte_weights, byte_columns, bytes_,
    byte_words, rows_to_take, factors, tops, row_tops, row_scratch, offset_scratch, chosen, clock,
):  # fmt: skip
    """Index of the largest logit of each row of `final` [R, hidden], without the whole product; NOT_PICKED for some.

    first_rows: int64 [parts + 1], where the rows of each part of the step begin. Part i is ready when thread i comes
    here. A thread begins with its own part and then helps with the others, so that little waits for a late one.
    """
    hidden, num_panels, num_parts = final.shape[1], w_head.shape[0], first_rows.shape[0] - 1
    if thread == 0:
        clock[-1] = monotonic_ns()
    for turn in range(num_parts):
        part = (thread + turn) % num_parts
        first, last = first_rows[part], first_rows[part + 1]
        rows, height = last - first, tile_height(last - first)
        part_final, part_chosen = final[first:last].reshape(-1), chosen[first:last]
        part_bytes = bytes_[(first + part * TILE_ROWS) * hidden :]
        part_words = byte_words[(first + part * TILE_ROWS) * hidden // 4 :]
        part_take, part_factors = rows_to_take[first:last], factors[first:last]
        part_tops = tops[first * num_panels : last * num_panels]
        ready = _COUNTERS_PER_PART * COUNTER_STRIDE * part
        panel, busy, row = ready + COUNTER_STRIDE, ready + 2 * COUNTER_STRIDE, ready + 3 * COUNTER_STRIDE
        if thread == part:
            for top in range(0, rows, height):
                for r in range(top, min(rows, top + height)):
                    place = (top * hidden // 4 + (r - top)) * 4
                    part_chosen[r] = 0
                    if not quantise_row(
                        part_final, r * hidden, hidden, part_bytes, place, height, part_take, part_factors, r
                    ):
                        part_chosen[r] = NOT_PICKED
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
            if part_chosen[r] != NOT_PICKED:
                part_chosen[r], panels = pick_row(
                    part_final, r, rows, w_head, vocab, part_tops, row_tops[thread],
                    row_scratch[thread], ZEROS, offset_scratch[thread],
                )  # fmt: skip
                atomic_add(counters, _COUNTERS_PER_PART * COUNTER_STRIDE * num_parts, panels)
            r = atomic_add(counters, row, 1)
        _book(thread, clock, _ARGMAX)
    barrier(sync, num_threads)
    _book(thread, clock, _ARGMAX)


@njit(nogil=True, cache=True)
def _meet(thread, num_threads, sync):
    """What ends the work of threads that each computed a part."""
    barrier(sync, num_threads)


@njit(nogil=True, cache=True)
def _project(
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
def _normalise(thread, num_threads, sync, logits, vocab, out):
    """The normaliser of each row of `logits` [R, padded vocab], by `num_threads` threads."""
    flat = logits.reshape(-1)
    for i in range(thread, out.shape[0], num_threads):
        out[i] = log_normaliser_row(flat, i * logits.shape[1], vocab)
    barrier(sync, num_threads)


class _Crew:
    """Threads that run one compiled function together: the caller is number 0, the others wait for its call.

    They end with `close`, with this object, or when Python ends, whichever is first.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._inboxes: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(num_threads - 1)]
        threads = [
            threading.Thread(target=_serve, args=(number, num_threads, inbox), daemon=True, name=f"isologit-{number}")
            for number, inbox in enumerate(self._inboxes, start=1)
        ]
        for thread in threads:
            thread.start()
        self.close = weakref.finalize(self, _dismiss, self._inboxes, threads)

    def run(self, function: Any, *args: Any) -> None:
        """`function(thread, num_threads, *args)` on every thread; it must end with a barrier."""
        for inbox in self._inboxes:
            inbox.put((function, args))
        function(0, self.num_threads, *args)


def _serve(number: int, num_threads: int, inbox: SimpleQueue[Any]) -> None:
    while (call := inbox.get()) is not None:
        function, args = call
        function(number, num_threads, *args)
        del call, args  # NOTE: a waiting thread must not keep the last step's arrays alive


def _dismiss(inboxes: list[SimpleQueue[Any]], threads: list[threading.Thread]) -> None:
    for inbox in inboxes:
        inbox.put(None)
    for thread in threads:
        thread.join(_LONGEST_GOODBYE_S)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class LlamaCPU:
    """LLaMA weights packed for the CPU kernels; `forward` runs one step.

    `storage` is the dtype the weights are kept in ("float32", "float16", "bfloat16"); 16-bit weights are widened
    exactly inside the product, all arithmetic is float32. Raises ModelError for a model with biases.
    """

    block_size = PANEL_WIDTH

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, torch.Tensor],
        *,
        max_model_len: int,
        num_threads: int,
    ) -> None:
        if config.attention_bias or config.mlp_bias:
            raise ModelError("the model has biases (attention_bias or mlp_bias), which the CPU kernels do not compute")
        self.config = config
        self.storage = config.dtype
        self.num_threads = num_threads
        self.max_model_len = max_model_len
        self._crew = _Crew(num_threads)
        self._clocks = np.zeros((num_threads, len(PHASES) + 1), np.int64)
        self._steps_without_bounds = 0
        self._load(tensors)
        angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), rope_inv_freq(config))
        self._cos, self._sin = angles.cos().numpy().reshape(-1), angles.sin().numpy().reshape(-1)
        self.allocate_kv(0)
        self.reserve(1)

    def close(self) -> None:
        """End the worker threads; the model cannot be used afterwards."""
        self._crew.close()

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        config, storage = self.config, self.storage
        layers, hidden = config.num_hidden_layers, config.hidden_size
        dtype = {"float32": np.float32, "float16": np.int16, "bfloat16": np.uint16}[storage]
        qkv_features = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        gate_panels = -(-config.intermediate_size // VECTOR_WIDTH)
        attention_features = config.num_attention_heads * config.head_dim

        def empty(panels: int, in_features: int) -> np.ndarray:
            return zeros((layers, panels, in_features, PANEL_WIDTH), dtype)

        self._w_qkv = empty(panel_count(qkv_features), hidden)
        self._w_out = empty(panel_count(hidden), attention_features)
        self._w_gate_up = empty(gate_panels, hidden)
        self._w_down = empty(panel_count(hidden), config.intermediate_size)
        self._input_gains = np.empty((layers, hidden), np.float32)
        self._post_gains = np.empty((layers, hidden), np.float32)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."

            def get(name: str, prefix: str = prefix) -> torch.Tensor:
                return tensors[f"{prefix}{name}.weight"]

            fused = torch.cat([get(f"self_attn.{name}_proj") for name in "qkv"])
            self._w_qkv[layer] = pack_weight(fused, storage)
            self._w_out[layer] = pack_weight(get("self_attn.o_proj"), storage)
            gate_up = interleave_gate_up(get("mlp.gate_proj"), get("mlp.up_proj"))
            self._w_gate_up[layer] = pack_weight(gate_up, storage)
            self._w_down[layer] = pack_weight(get("mlp.down_proj"), storage)
            self._input_gains[layer] = get("input_layernorm").float().numpy()
            self._post_gains[layer] = get("post_attention_layernorm").float().numpy()
        self._final_gain = tensors["model.norm.weight"].float().numpy()
        embedding = tensors["model.embed_tokens.weight"]
        self._embedding = embedding.float().numpy()
        head = embedding if config.tie_word_embeddings else tensors["lm_head.weight"]
        self._w_head = aligned(pack_weight(head, storage))
        self._byte_head = pack_byte_head(head) if HAS_BYTE_PRODUCTS else None

    def weight_bytes(self) -> int:
        """Bytes of all product weights."""
        arrays = (self._w_qkv, self._w_out, self._w_gate_up, self._w_down, self._w_head)
        return sum(array.nbytes for array in arrays)

    def step_bytes(self) -> int:
        """Bytes of them that a step reads, if it chooses tokens by the bytes of the last product."""
        saved = self._w_head.nbytes - self._byte_head.nbytes if self._byte_head is not None else 0
        return self.weight_bytes() - saved

    def kv_bytes_per_block(self) -> int:
        """Bytes of keys and values of one block over all layers."""
        c = self.config
        return 4 * c.num_hidden_layers * c.num_key_value_heads * self.block_size * (c.head_dim + self._value_width)

    @property
    def phase_ns(self) -> dict[str, int]:
        """Nanoseconds the first thread spent in each of PHASES since `reset_phases`, waiting for others included."""
        return dict(zip(PHASES, self._clocks[0, :-1].tolist(), strict=True))

    def reset_phases(self) -> None:
        """Begin new books."""
        self._clocks[:] = 0

    @property
    def _value_width(self) -> int:
        return _round_up(self.config.head_dim, PANEL_WIDTH)

    def allocate_kv(self, num_blocks: int) -> None:
        """Make room for `num_blocks` blocks of `block_size` tokens; all is written, so no step waits for a page."""
        c = self.config
        per_block = c.num_key_value_heads * self.block_size
        self._keys = self._values = zeros((c.num_hidden_layers, 0))  # the old ones go first
        self._keys = zeros((c.num_hidden_layers, num_blocks * per_block * c.head_dim))
        self._values = zeros((c.num_hidden_layers, num_blocks * per_block * self._value_width))
        self._keys.fill(0)
        self._values.fill(0)

    def reserve(self, max_num_batched_tokens: int) -> None:
        """Allocate the step's buffers for up to `max_num_batched_tokens` tokens."""
        c, tokens = self.config, max_num_batched_tokens
        group = c.num_attention_heads // c.num_key_value_heads
        self.tile_tokens = max(1, TILE_ROWS // group)
        tile_rows = self.tile_tokens * group
        hidden = _round_up(c.hidden_size, PANEL_WIDTH)
        self._residual = zeros((tokens, hidden))
        self._qkv = zeros((tokens, self._w_qkv.shape[1] * PANEL_WIDTH))
        self._attended = zeros((tokens, c.num_attention_heads * c.head_dim))
        self._kept_residual, self._kept_attended = zeros(self._residual.shape), zeros(self._attended.shape)
        # NOTE: what products read lies in tiles, of which the last may be only partly filled.
        tiled = tokens + TILE_ROWS * self.num_threads
        self._normed = zeros(tiled * c.hidden_size)
        self._packed = zeros(tiled * c.num_attention_heads * c.head_dim)
        self._gated = zeros(tiled * self._w_gate_up.shape[1] * VECTOR_WIDTH)
        self._query_scratch = zeros((self.num_threads, tile_rows * self._value_width))
        self._row_scratch = zeros((self.num_threads, SCRATCH_SIZE))
        self._offset_scratch = zeros((self.num_threads, _round_up(TILE_ROWS, COUNTER_STRIDE)), np.int64)
        self._chunk_scratch = zeros((self.num_threads, MAX_CHUNKS + COUNTER_STRIDE), np.int64)
        context = _round_up(self.max_model_len, PANEL_WIDTH) + PANEL_WIDTH
        self._score_scratch = zeros((self.num_threads, tile_rows, context))
        self._weight_scratch = zeros((self.num_threads, tile_rows * context))
        self._sum_scratch = zeros((self.num_threads, max(tile_rows, TILE_ROWS)))
        counters = _COUNTERS_PER_LAYER * c.num_hidden_layers + 1
        self._counters = zeros((self.num_threads, COUNTER_STRIDE * counters), np.int64)
        self._final = zeros((tokens, c.hidden_size))
        self._logits = zeros((0, self._w_head.shape[0] * PANEL_WIDTH))
        if self._byte_head is not None:
            self._final_bytes = zeros(tiled * c.hidden_size, np.int8)
            self._rows_to_take = zeros(tokens, np.int32)
            self._factors = zeros((tokens, 3))
            self._tops = zeros(tokens * self._w_head.shape[0])
            self._row_tops = zeros((self.num_threads, _round_up(self._w_head.shape[0], TILE_ROWS)))

    def forward(self, batch: FlatBatch) -> StepOutput:
        """Run one step; what is returned are views, valid until the next call of this object.

        With enough rows each thread computes sequences of its own, from the embedding to the last norm: then threads
        do not wait for each other between operations, and while one waits for memory another computes.
        """
        parts, rows = self._parts(batch), len(batch.logits_rows)
        final, chosen = self._final[:rows], np.empty(rows, np.int64)
        first_rows = np.cumsum([0, *(len(part.token_ids) for part in parts)])
        first_logits = np.cumsum([0, *(len(part.logits_rows) for part in parts)])
        steps = [
            self._step_arguments(
                part, number, first_rows[number], final[slice(*first_logits[number : number + 2])], len(parts)
            )
            for number, part in enumerate(parts)
        ]
        sync, panels_computed = np.zeros(COUNTER_STRIDE, np.int64), COUNTER_STRIDE * _COUNTERS_PER_PART * len(parts)
        counters = zeros(panels_computed + COUNTER_STRIDE, np.int64)
        head = None if batch.whole_logits or self._steps_without_bounds else self._byte_head
        choice: tuple[Any, ...] = ()
        if head is not None:
            choice = (
                counters, first_logits, final, self._w_head, self.config.vocab_size, head.weights, head.columns,
                self._final_bytes, self._final_bytes.view(np.int32), self._rows_to_take, self._factors, self._tops,
                self._row_tops, self._row_scratch, self._offset_scratch, chosen, self._clocks[0],
            )  # fmt: skip

        def work(thread: int, num_threads: int) -> None:
            if len(parts) > 1:
                _step(0, 1, *steps[thread])
            else:
                _step(thread, num_threads, *steps[0])
            (_choose if choice else _meet)(thread, num_threads, sync, *choice)

        self._crew.run(work)
        if batch.whole_logits:
            logits, chosen = self._whole_rows(final)
            return StepOutput(chosen, final, logits)
        if head is None:
            self._steps_without_bounds = max(0, self._steps_without_bounds - 1)
            return StepOutput(self._whole_rows(final)[1], final, None)
        if counters[panels_computed] > len(self._w_head) // 4 + _PAYING_PANELS * rows:
            self._steps_without_bounds = _PAUSE_STEPS
        open_rows = np.flatnonzero(chosen == NOT_PICKED)
        if len(open_rows):
            chosen[open_rows] = self._whole_rows(final[open_rows])[1]
        return StepOutput(chosen, final, None)

    def _parts(self, batch: FlatBatch) -> list[FlatBatch]:
        """One for each thread, or the whole batch for all."""
        if self.num_threads == 1 or len(batch.token_ids) < _LEAST_ROWS_APART * self.num_threads:
            return [batch]
        parts = batch.split(self.num_threads, self._rows_per_token())
        return parts if min(len(part.token_ids) for part in parts) >= _LEAST_ROWS_APART else [batch]

    def _rows_per_token(self) -> float:
        """What a token of context costs, relative to a row."""
        c = self.config
        parameters = sum(array.size for array in (self._w_qkv, self._w_out, self._w_gate_up, self._w_down))
        read = 4 * c.num_hidden_layers * c.num_key_value_heads * (c.head_dim + self._value_width)
        return _FLOP_PER_BYTE * read / (2 * parameters)

    def _step_arguments(
        self, part: FlatBatch, number: int, first_row: int, final: np.ndarray, num_parts: int
    ) -> tuple[Any, ...]:
        """What `_step` wants for the `number`-th part of a step, whose rows begin at `first_row`."""
        c, tokens, num_threads = self.config, len(part.token_ids), self.num_threads // num_parts
        work = part.attention_work(self.tile_tokens, c.num_key_value_heads, num_threads)
        last = work
        if len(final) < tokens:
            last = part.attention_work(self.tile_tokens, c.num_key_value_heads, num_threads, logits_only=True)
        rows, own = slice(first_row, first_row + tokens), slice(number, None)
        tiled = first_row + number * TILE_ROWS
        self._counters[number] = 0
        return (
            np.zeros(COUNTER_STRIDE, np.int64), self._counters[number],
            part.token_ids, part.positions, part.slots, work.tiles, work.items, work.written_first,
            last.tiles, last.items, last.written_first, part.block_tables, part.logits_rows,
            self._embedding, self._input_gains, self._post_gains, self._final_gain,
            self._w_qkv, self._w_out, self._w_gate_up, self._w_down,
            c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size, c.intermediate_size,
            self._value_width, np.float32(c.rms_norm_eps), self._cos, self._sin, self._keys, self._values,
            self._residual[rows], self._normed[tiled * c.hidden_size :], self._qkv[rows], self._attended[rows],
            self._packed[tiled * c.num_attention_heads * c.head_dim :],
            self._gated[tiled * self._w_gate_up.shape[1] * VECTOR_WIDTH :],
            self._kept_residual[rows], self._kept_attended[rows], self._query_scratch[own], self._score_scratch[own],
            self._weight_scratch[own], self._sum_scratch[own], self._row_scratch[own], self._offset_scratch[own],
            self._chunk_scratch[own], final, self._clocks[number],
        )  # fmt: skip

    def project(self, final: np.ndarray) -> np.ndarray:
        """Logits float32 [n, vocab] of n rows of `StepOutput.final`, bit for bit those of their own steps."""
        logits = np.empty((len(final), self.config.vocab_size), np.float32)
        for first in range(0, len(final), len(self._final)):
            part = slice(first, first + len(self._final))
            logits[part] = self._whole_rows(final[part])[0]
        return logits

    def _whole_rows(self, final: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [R, vocab], and the index of the largest, int64 [R]; -1 where there is NaN."""
        rows = len(final)
        if rows > self._logits.shape[0]:
            self._logits = zeros((rows, self._logits.shape[1]))
        chosen = np.empty(rows, np.int64)
        self._run(
            _project, final, self._w_head, self.config.vocab_size, self._normed, self._row_scratch,
            self._offset_scratch, self._logits, chosen, self._clocks[0],
        )  # fmt: skip
        return self._logits[:rows, : self.config.vocab_size], chosen

    def _run(self, function: Any, *args: Any) -> None:
        """`function` on all threads, its barrier and its counters at zero."""
        self._counters[0] = 0
        self._crew.run(function, np.zeros(COUNTER_STRIDE, np.int64), self._counters[0], *args)

    def log_normalisers(self, rows: int) -> np.ndarray:
        """log(sum(exp(logits))) of the first `rows` rows of the last step, float64 [rows]."""
        out = np.empty(rows)
        self._crew.run(_normalise, np.zeros(COUNTER_STRIDE, np.int64), self._logits, self.config.vocab_size, out)
        return out
