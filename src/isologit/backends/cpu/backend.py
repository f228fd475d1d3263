"""LLaMA on the CPU: packed weights, the paged KV cache, the buffers of a step, and who computes which rows.

It does not know requests: it sees a `FlatBatch`. What is computed is in `step.py`; no thread pool but the crew's own
threads is involved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from isologit.backends.base import LoadOptions, Memory
from isologit.backends.batch import FlatBatch, ReadyOutput, StepOutput
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
from isologit.backends.cpu.work import attention_work, split
from isologit.backends.rope import rope_inv_freq
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.common.memory import free_memory
from isologit.config import ModelConfig
from isologit.errors import ModelError

_PAYING_PANELS = 20  # computed for each row, and a quarter of all once: so many cost less than the whole product
_PAUSE_STEPS = 64  # without bounds after a step that computed more
_LEAST_ROWS_APART = 2 * TILE_ROWS  # of a thread's own part of a step: with fewer, weights are what it waits for
_FLOP_PER_BYTE = 5.0  # what a thread computes in the time in which it reads a byte of keys or values


STORED = {"float32": np.float32, "float16": np.int16, "bfloat16": np.uint16}  # what holds the weights' bits


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def tile_tokens(config: ModelConfig) -> int:
    """Tokens of an attention tile: as many as have a register tile's rows of queries for one KV head."""
    return max(1, TILE_ROWS // (config.num_attention_heads // config.num_key_value_heads))


def value_width(config: ModelConfig) -> int:
    """float32 that one token's values of one head take in a block."""
    return _round_up(config.head_dim, PANEL_WIDTH)


def buffer_shapes(
    config: ModelConfig, max_model_len: int, num_threads: int, num_tokens: int, byte_head: bool
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of all that steps of up to `num_tokens` tokens work in."""
    c, tokens, float32 = config, num_tokens, np.float32
    group = c.num_attention_heads // c.num_key_value_heads
    tile_rows = tile_tokens(c) * group
    heads_size = c.num_attention_heads * c.head_dim
    residual = (tokens, _round_up(c.hidden_size, PANEL_WIDTH))
    qkv_panels = panel_count(heads_size + 2 * c.num_key_value_heads * c.head_dim)
    # NOTE: what products read lies in tiles, of which the last may be only partly filled.
    tiled = tokens + TILE_ROWS * num_threads
    context = _round_up(max_model_len, PANEL_WIDTH) + PANEL_WIDTH
    counters = COUNTERS_PER_LAYER * c.num_hidden_layers + 1
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "residual": (residual, float32),
        "qkv": ((tokens, qkv_panels * PANEL_WIDTH), float32),
        "attended": ((tokens, heads_size), float32),
        "kept_residual": (residual, float32),
        "kept_attended": ((tokens, heads_size), float32),
        "normed": ((tiled * c.hidden_size,), float32),
        "packed": ((tiled * heads_size,), float32),
        "gated": ((tiled * _round_up(c.intermediate_size, VECTOR_WIDTH),), float32),
        "query_scratch": ((num_threads, tile_rows * value_width(c)), float32),
        "row_scratch": ((num_threads, SCRATCH_SIZE), float32),
        "offset_scratch": ((num_threads, _round_up(TILE_ROWS, COUNTER_STRIDE)), np.int64),
        "chunk_scratch": ((num_threads, MAX_CHUNKS + COUNTER_STRIDE), np.int64),
        "head_scratch": ((num_threads, 2 * tokens * (group + 2) * c.head_dim), float32),
        "score_scratch": ((num_threads, tile_rows, context), float32),
        "weight_scratch": ((num_threads, tile_rows * context), float32),
        "sum_scratch": ((num_threads, max(tile_rows, TILE_ROWS)), float32),
        "counters": ((num_threads, COUNTER_STRIDE * counters), np.int64),
        "final": ((tokens, c.hidden_size), float32),
    }
    if byte_head:
        panels = panel_count(c.vocab_size)
        shapes |= {
            "final_bytes": ((tiled * c.hidden_size,), np.int8),
            "rows_to_take": ((tokens,), np.int32),
            "factors": ((tokens, 3), float32),
            "tops": ((tokens * panels,), float32),
            "row_tops": ((num_threads, _round_up(panels, TILE_ROWS)), float32),
        }
    return shapes


def nbytes(shapes: dict[str, tuple[tuple[int, ...], Any]]) -> int:
    """Bytes of arrays of these shapes and dtypes."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())


def kv_block_bytes(config: ModelConfig) -> int:
    """Bytes of keys and values of one block over all layers."""
    block: int = kv_block_size(config.head_dim, value_width(config))
    return 4 * config.num_hidden_layers * config.num_key_value_heads * block


def weight_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of all weights and tables as they are kept."""
    c, float32 = config, np.float32
    stored = STORED[c.dtype]
    heads_size = c.num_attention_heads * c.head_dim
    layer, hidden, panels = (c.num_hidden_layers,), c.hidden_size, panel_count(c.vocab_size)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "embedding": ((c.vocab_size, hidden), float32),
        "norms": ((2 * c.num_hidden_layers + 1, hidden), float32),
        "qkv": (
            (*layer, panel_count(heads_size + 2 * c.num_key_value_heads * c.head_dim), hidden, PANEL_WIDTH),
            stored,
        ),
        "out": ((*layer, panel_count(hidden), heads_size, PANEL_WIDTH), stored),
        "gate_up": ((*layer, -(-c.intermediate_size // VECTOR_WIDTH), hidden, PANEL_WIDTH), stored),
        "down": ((*layer, panel_count(hidden), c.intermediate_size, PANEL_WIDTH), stored),
        "head": ((panels, hidden, PANEL_WIDTH), stored),
    }
    if HAS_BYTE_PRODUCTS:
        shapes["byte_head"] = ((panels, hidden // 4, PANEL_WIDTH), np.int32)
        shapes["byte_columns"] = ((panels, 3, PANEL_WIDTH), float32)
    return shapes


class CPUBackend:
    """`backends.base.Backend` on the host's cores.

    `storage` is the dtype the weights are kept in ("float32", "float16", "bfloat16"); 16-bit weights are widened
    exactly inside the product, all arithmetic is float32. Raises ModelError for a model with biases.
    """

    name: ClassVar[str] = "cpu"
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

    @classmethod
    def why_not(cls, device: str) -> str | None:
        """It runs on every CPU, and on nothing else."""
        return None if device in ("auto", "cpu") else "it runs on the CPU only"

    @classmethod
    def load(cls, checkpoint: Checkpoint, options: LoadOptions) -> CPUBackend:
        """Pack the checkpoint's weights. Raises ModelError for a model with biases."""
        return cls(
            checkpoint.config,
            checkpoint.tensors,
            max_model_len=options.max_model_len,
            num_threads=options.num_threads,
        )

    def close(self) -> None:
        """End the worker threads and let go of all memory; the model cannot be used afterwards."""
        self._crew.close()
        vars(self).clear()

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        config, storage = self.config, self.storage
        layers, hidden = config.num_hidden_layers, config.hidden_size
        dtype = STORED[storage]
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

    @classmethod
    def plan_memory(cls, config: ModelConfig, options: LoadOptions, num_tokens: int) -> Memory:
        """See `Backend`."""
        shapes = buffer_shapes(config, options.max_model_len, options.num_threads, num_tokens, HAS_BYTE_PRODUCTS)
        angles = 4 * options.max_model_len * config.head_dim
        return Memory(nbytes(weight_shapes(config)) + angles, kv_block_bytes(config), nbytes(shapes))

    def memory(self) -> Memory:
        """What is held now: weights in all their forms, and the buffers that are reserved."""
        kept = (self._embedding, self._input_gains, self._post_gains, self._final_gain, self._cos, self._sin)
        weights = self.weight_bytes() + sum(array.nbytes for array in kept)
        weights += self._byte_head.nbytes if self._byte_head is not None else 0
        buffers = sum(array.nbytes for array in self._buffers.values())
        return Memory(weights, kv_block_bytes(self.config), buffers)

    def free_memory(self) -> int:
        """What the machine, its control groups and `ulimit` leave."""
        return free_memory().nbytes

    def describe(self) -> dict[str, Any]:
        """See `Backend`."""
        return {
            "device": "cpu",
            "kernels": "numba",
            "compute_dtype": "float32",
            "weights_dtype": self.storage,
            "weight_bytes": self.weight_bytes(),
            "step_bytes": self.step_bytes(),
            "num_threads": self.num_threads,
        }

    def weight_bytes(self) -> int:
        """Bytes of all product weights."""
        arrays = (self._w_qkv, self._w_out, self._w_gate_up, self._w_down, self._w_head)
        return sum(array.nbytes for array in arrays)

    def step_bytes(self) -> int:
        """Bytes of them that a step reads, if it chooses tokens by the bytes of the last product."""
        saved = self._w_head.nbytes - self._byte_head.nbytes if self._byte_head is not None else 0
        return self.weight_bytes() - saved

    def phases(self) -> dict[str, float]:
        """Seconds the first thread spent in each of PHASES since `reset_phases`, waiting for others included."""
        return dict(zip(PHASES, (self._clocks[0, :-1] * 1e-9).tolist(), strict=True))

    def reset_phases(self) -> None:
        """Begin new books."""
        self._clocks[:] = 0

    def allocate_kv(self, num_blocks: int) -> None:
        """Make room for `num_blocks` blocks of `block_size` tokens; all is written, so no step waits for a page."""
        c = self.config
        self._kv = zeros((c.num_hidden_layers, 0))  # the old one goes first
        per_block = c.num_key_value_heads * kv_block_size(c.head_dim, value_width(c))
        self._kv = zeros((c.num_hidden_layers, num_blocks * per_block))
        self._kv.fill(0)

    def reserve(self, num_tokens: int) -> None:
        """Buffers for steps of up to `num_tokens` tokens."""
        self.tile_tokens = tile_tokens(self.config)
        shapes = buffer_shapes(
            self.config, self.max_model_len, self.num_threads, num_tokens, self._byte_head is not None
        )
        self._buffers = {name: zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        self._logits = zeros((0, self._w_head.shape[0] * PANEL_WIDTH))

    def forward(self, batch: FlatBatch) -> StepOutput:
        """Run one step; what is returned are views, valid until the next call of this object.

        With enough rows each thread computes sequences of its own, from the embedding to the last norm: then threads
        do not wait for each other between operations, and while one waits for memory another computes.
        """
        b, parts, rows = self._buffers, self._parts(batch), len(batch.logits_rows)
        final, chosen = b["final"][:rows], np.full(rows, NOT_PICKED)
        first_rows = np.cumsum([0, *(len(part.token_ids) for part in parts)])
        first_logits = np.cumsum([0, *(len(part.logits_rows) for part in parts)])
        steps = [
            self._step_arguments(
                part, number, first_rows[number], final[slice(*first_logits[number : number + 2])], len(parts)
            )
            for number, part in enumerate(parts)
        ]
        wanted = batch.logits_wanted
        bounded = self._byte_head is not None and not self._steps_without_bounds
        picked = np.flatnonzero(~wanted) if bounded else np.empty(0, np.int64)  # rows chosen without all their logits
        sync, panels_computed = np.zeros(COUNTER_STRIDE, np.int64), COUNTER_STRIDE * COUNTERS_PER_PART * len(parts)
        counters = zeros(panels_computed + COUNTER_STRIDE, np.int64)
        choice: tuple[Any, ...] = ()
        if len(picked):
            assert self._byte_head is not None
            choice = (
                counters, picked, np.searchsorted(picked, first_logits), final, self._w_head, self.config.vocab_size,
                self._byte_head.weights, self._byte_head.columns, b["final_bytes"], b["final_bytes"].view(np.int32),
                b["rows_to_take"], b["factors"], b["tops"], b["row_tops"], b["row_scratch"],
                b["offset_scratch"], chosen, self._clocks[0],
            )  # fmt: skip

        def work(thread: int, num_threads: int) -> None:
            if len(parts) > 1:
                run_step(0, 1, *steps[thread])
            else:
                run_step(thread, num_threads, *steps[0])
            (choose_rows if choice else meet)(thread, num_threads, sync, *choice)

        self._crew.run(work)
        if len(picked):
            if counters[panels_computed] > len(self._w_head) // 4 + _PAYING_PANELS * len(picked):
                self._steps_without_bounds = _PAUSE_STEPS
        elif not wanted.all():
            self._steps_without_bounds = max(0, self._steps_without_bounds - 1)
        computed = np.concatenate([np.flatnonzero(wanted), np.flatnonzero(~wanted & (chosen == NOT_PICKED))])
        if len(computed):
            in_order = len(computed) == rows and (wanted.all() or not wanted.any())
            logits, chosen[computed] = self._whole_rows(final if in_order else final[computed])
        else:
            logits = self._logits[:0, : self.config.vocab_size]
        return ReadyOutput(chosen, final, logits[: wanted.sum()])

    def _parts(self, batch: FlatBatch) -> list[FlatBatch]:
        """One for each thread, or the whole batch for all."""
        if self.num_threads == 1 or len(batch.token_ids) < _LEAST_ROWS_APART * self.num_threads:
            return [batch]
        parts = split(batch, self.num_threads, self._rows_per_token())
        return parts if min(len(part.token_ids) for part in parts) >= _LEAST_ROWS_APART else [batch]

    def _rows_per_token(self) -> float:
        """What a token of context costs, relative to a row."""
        c = self.config
        parameters = sum(array.size for array in (self._w_qkv, self._w_out, self._w_gate_up, self._w_down))
        read = 4 * c.num_hidden_layers * c.num_key_value_heads * (c.head_dim + value_width(c))
        return _FLOP_PER_BYTE * read / (2 * parameters)

    def _step_arguments(
        self, part: FlatBatch, number: int, first_row: int, final: np.ndarray, num_parts: int
    ) -> tuple[Any, ...]:
        """What `run_step` wants for the `number`-th part of a step, whose rows begin at `first_row`."""
        c, tokens, num_threads = self.config, len(part.token_ids), self.num_threads // num_parts
        work = attention_work(part, self.tile_tokens, c.num_key_value_heads, num_threads)
        last = work
        if len(final) < tokens:
            last = attention_work(part, self.tile_tokens, c.num_key_value_heads, num_threads, logits_only=True)
        b, rows, own = self._buffers, slice(first_row, first_row + tokens), slice(number, None)
        tiled = first_row + number * TILE_ROWS
        b["counters"][number] = 0
        return (
            np.zeros(COUNTER_STRIDE, np.int64), b["counters"][number],
            part.token_ids, part.positions, part.slots, work.tiles, work.items, work.written_first,
            last.tiles, last.items, last.written_first, part.block_tables, part.logits_rows,
            self._embedding, self._input_gains, self._post_gains, self._final_gain,
            self._w_qkv, self._w_out, self._w_gate_up, self._w_down,
            c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size, c.intermediate_size,
            value_width(c), np.float32(c.rms_norm_eps), self._cos, self._sin, self._kv,
            b["residual"][rows], b["normed"][tiled * c.hidden_size :], b["qkv"][rows], b["attended"][rows],
            b["packed"][tiled * c.num_attention_heads * c.head_dim :],
            b["gated"][tiled * self._w_gate_up.shape[1] * VECTOR_WIDTH :],
            b["kept_residual"][rows], b["kept_attended"][rows], b["query_scratch"][own], b["score_scratch"][own],
            b["weight_scratch"][own], b["sum_scratch"][own], b["row_scratch"][own], b["offset_scratch"][own],
            b["chunk_scratch"][own], b["head_scratch"][own], final, self._clocks[number],
        )  # fmt: skip

    def project(self, final: np.ndarray) -> np.ndarray:
        """Logits float32 [n, vocab] of n rows of `StepOutput.final`, bit for bit those of their own steps."""
        logits = np.empty((len(final), self.config.vocab_size), np.float32)
        for first in range(0, len(final), len(self._buffers["final"])):
            part = slice(first, first + len(self._buffers["final"]))
            logits[part] = self._whole_rows(final[part])[0]
        return logits

    def _whole_rows(self, final: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [R, vocab], and the index of the largest, int64 [R]; -1 where there is NaN."""
        b, rows = self._buffers, len(final)
        if rows > self._logits.shape[0]:
            self._logits = zeros((rows, self._logits.shape[1]))
        chosen = np.empty(rows, np.int64)
        self._run(
            project_rows, final, self._w_head, self.config.vocab_size, b["normed"], b["row_scratch"],
            b["offset_scratch"], self._logits, chosen, self._clocks[0],
        )  # fmt: skip
        return self._logits[:rows, : self.config.vocab_size], chosen

    def _run(self, function: Any, *args: Any) -> None:
        """`function` on all threads, its barrier and its counters at zero."""
        self._buffers["counters"][0] = 0
        self._crew.run(function, np.zeros(COUNTER_STRIDE, np.int64), self._buffers["counters"][0], *args)

    def log_normalisers(self, output: StepOutput) -> np.ndarray:
        """log(sum(exp(logits))) of each row of the last step's logits, float64 [W]."""
        out = np.empty(len(output.logits))
        self._crew.run(normalise_rows, np.zeros(COUNTER_STRIDE, np.int64), self._logits, self.config.vocab_size, out)
        return out
