"""LLaMA on the CPU: packed weights, the paged KV cache, the buffers of a step, and who computes which rows.

It does not know requests: it sees a `FlatBatch`. What is computed is in `step.py`; no thread pool but the crew's own
threads is involved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from isologit.backends.batch import FlatBatch, StepOutput
from isologit.backends.cpu.crew import Crew
from isologit.backends.cpu.heads import MAX_CHUNKS
from isologit.backends.cpu.kernels import (
    COUNTER_STRIDE,
    SCRATCH_SIZE,
    interleave_gate_up,
    kv_block_size,
    pack_weight,
    panel_count,
)
from isologit.backends.cpu.memory import aligned, zeros
from isologit.backends.cpu.shortlist import NOT_PICKED, pack_byte_head
from isologit.backends.cpu.simd import HAS_BYTE_PRODUCTS, PANEL_WIDTH, TILE_ROWS, VECTOR_WIDTH
from isologit.backends.cpu.step import (
    COUNTERS_PER_LAYER,
    COUNTERS_PER_PART,
    PHASES,
    choose_rows,
    meet,
    normalise_rows,
    project_rows,
    run_step,
)
from isologit.backends.rope import rope_inv_freq
from isologit.config import ModelConfig
from isologit.errors import ModelError

_PAYING_PANELS = 20  # computed for each row, and a quarter of all once: so many cost less than the whole product
_PAUSE_STEPS = 64  # without bounds after a step that computed more
_LEAST_ROWS_APART = 2 * TILE_ROWS  # of a thread's own part of a step: with fewer, weights are what it waits for
_FLOP_PER_BYTE = 5.0  # what a thread computes in the time in which it reads a byte of keys or values


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
        self._crew = Crew(num_threads)
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
        block_size: int = kv_block_size(c.head_dim, self._value_width)
        return 4 * c.num_hidden_layers * c.num_key_value_heads * block_size

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
        self._kv = zeros((c.num_hidden_layers, 0))  # the old one goes first
        per_block = c.num_key_value_heads * kv_block_size(c.head_dim, self._value_width)
        self._kv = zeros((c.num_hidden_layers, num_blocks * per_block))
        self._kv.fill(0)

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
        self._head_scratch = zeros((self.num_threads, 2 * tokens * (group + 2) * c.head_dim))
        context = _round_up(self.max_model_len, PANEL_WIDTH) + PANEL_WIDTH
        self._score_scratch = zeros((self.num_threads, tile_rows, context))
        self._weight_scratch = zeros((self.num_threads, tile_rows * context))
        self._sum_scratch = zeros((self.num_threads, max(tile_rows, TILE_ROWS)))
        counters = COUNTERS_PER_LAYER * c.num_hidden_layers + 1
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
        sync, panels_computed = np.zeros(COUNTER_STRIDE, np.int64), COUNTER_STRIDE * COUNTERS_PER_PART * len(parts)
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
                run_step(0, 1, *steps[thread])
            else:
                run_step(thread, num_threads, *steps[0])
            (choose_rows if choice else meet)(thread, num_threads, sync, *choice)

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
        """What `run_step` wants for the `number`-th part of a step, whose rows begin at `first_row`."""
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
            self._value_width, np.float32(c.rms_norm_eps), self._cos, self._sin, self._kv,
            self._residual[rows], self._normed[tiled * c.hidden_size :], self._qkv[rows], self._attended[rows],
            self._packed[tiled * c.num_attention_heads * c.head_dim :],
            self._gated[tiled * self._w_gate_up.shape[1] * VECTOR_WIDTH :],
            self._kept_residual[rows], self._kept_attended[rows], self._query_scratch[own], self._score_scratch[own],
            self._weight_scratch[own], self._sum_scratch[own], self._row_scratch[own], self._offset_scratch[own],
            self._chunk_scratch[own], self._head_scratch[own], final, self._clocks[number],
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
            project_rows, final, self._w_head, self.config.vocab_size, self._normed, self._row_scratch,
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
        self._crew.run(normalise_rows, np.zeros(COUNTER_STRIDE, np.int64), self._logits, self.config.vocab_size, out)
        return out
