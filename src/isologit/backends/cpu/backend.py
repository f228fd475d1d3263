"""LLaMA on the CPU: packed weights, the paged KV cache, the buffers of a step, and who computes which rows.

It does not know requests: it sees a `FlatBatch`. What is computed is in `step.py`; no thread pool but the crew's own
threads is involved.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch

from isologit.backends.base import LoadOptions, Memory
from isologit.backends.batch import FlatBatch, ReadyOutput, StepOutput
from isologit.backends.cpu.arguments import ChoiceScratch, Head, Scratch, Shape, Weights, Work
from isologit.backends.cpu.biases import pack_biases
from isologit.backends.cpu.crew import Crew
from isologit.backends.cpu.kernels import COUNTER_STRIDE, kv_block_size
from isologit.backends.cpu.loading import load_weights
from isologit.backends.cpu.memory import zeros
from isologit.backends.cpu.packing import PackedWeights
from isologit.backends.cpu.product_rate import product_rate
from isologit.backends.cpu.shortlist import NOT_PICKED
from isologit.backends.cpu.simd import PANEL_WIDTH, TILE_ROWS
from isologit.backends.cpu.sizes import (
    TABLES,
    Shapes,
    choice_shapes,
    kv_block_bytes,
    plan_memory,
    scratch_shapes,
    tile_tokens,
    value_width,
)
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
from isologit.backends.cpu.work import Costs, attention_work, split
from isologit.backends.rope import rope_inv_freq
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.common.compiler import VECTOR_WIDTH
from isologit.common.memory import free_memory
from isologit.config import ModelConfig

_PAYING_PANELS = 20  # computed for each row, and a quarter of all once: so many cost less than the whole product
_PAUSE_STEPS = 64  # without bounds after a step that computed more
_LEAST_ROWS_APART = 2 * TILE_ROWS  # of a thread's own part of a step: with fewer, weights are what it waits for
_FLOP_PER_BYTE = 5 / 8 * VECTOR_WIDTH  # what a thread computes in the time in which it reads a byte of keys or values


class CPUBackend:
    """`backends.base.Backend` on the host's cores.

    `storage` is the dtype the weights are kept in ("float32", "float16", "bfloat16"); 16-bit weights are widened
    exactly inside the product, all arithmetic is float32.
    """

    name: ClassVar[str] = "cpu"
    overlaps_steps: ClassVar[bool] = False
    block_size = PANEL_WIDTH
    numerics: ClassVar[tuple[str, ...]] = ("float32",)

    def __init__(
        self,
        config: ModelConfig,
        weights: PackedWeights,
        tensors: Mapping[str, torch.Tensor],
        *,
        max_model_len: int,
        num_threads: int,
    ) -> None:
        self.config = config
        self.storage = config.dtype
        self.num_threads = num_threads
        self.max_model_len = max_model_len
        self._crew = Crew(num_threads)
        self._clocks = np.zeros((num_threads, len(PHASES) + 1), np.int64)
        self._steps_without_bounds = 0
        self._packed = packed = weights
        self._w_head, self._byte_head = packed.w_head, packed.byte_head
        angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), rope_inv_freq(config))
        cos, sin = angles.cos().numpy().reshape(-1), angles.sin().numpy().reshape(-1)
        biases, steps = pack_biases(
            config,
            tensors,
            {
                "qkv": packed.w_qkv.shape[1],
                "out": packed.w_out.shape[1],
                "gate_up": packed.w_gate_up.shape[1],
                "down": packed.w_down.shape[1],
            },
        )
        self._shape = Shape(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            value_width=value_width(config),
            eps=np.float32(config.rms_norm_eps),
            **steps,
        )
        self._weights = Weights(
            embedding=packed.embedding,
            input_norms=packed.input_norms,
            post_norms=packed.post_norms,
            final_norm=packed.final_norm,
            qkv=packed.w_qkv,
            out=packed.w_out,
            gate_up=packed.w_gate_up,
            down=packed.w_down,
            **biases,
            cos=cos,
            sin=sin,
        )
        self._costs = self._find_costs()
        self.allocate_kv(0)
        self.reserve(1)

    @classmethod
    def why_not(cls, device: str) -> str | None:
        """It runs on every CPU, and on nothing else."""
        return None if device in ("auto", "cpu") else "it runs on the CPU only"

    @classmethod
    def load(cls, checkpoint: Checkpoint, options: LoadOptions) -> CPUBackend:
        """Pack the checkpoint's weights, or read them from the cache."""
        weights = load_weights(
            checkpoint,
            num_threads=options.num_threads,
            use_cache=options.weight_cache,
            on_progress=options.on_progress,
        )
        return cls(
            checkpoint.config,
            weights,
            checkpoint.tensors,
            max_model_len=options.max_model_len,
            num_threads=options.num_threads,
        )

    def close(self) -> None:
        """End the worker threads and let go of all memory; the model cannot be used afterwards."""
        self._crew.close()
        vars(self).clear()

    @classmethod
    def plan_memory(cls, config: ModelConfig, options: LoadOptions, num_tokens: int) -> Memory:
        """See `Backend`."""
        return plan_memory(config, options, num_tokens)

    @classmethod
    def own_memory(cls, device: str) -> None:
        """None: it is the host's."""

    @classmethod
    def product_rate(cls, num_threads: int) -> float:
        """Of the full register tile (about half a second, and some more to compile once)."""
        return product_rate(num_threads)

    def memory(self) -> Memory:
        """What is held now: weights in all their forms, and the buffers that are reserved."""
        tables = [array for name, array in self._weights._asdict().items() if name in TABLES]
        weights = self._packed.memory.nbytes + sum(array.nbytes for array in tables)
        buffers = [*self._scratch, *([] if self._choice is None else self._choice[1:])]
        return Memory(weights, kv_block_bytes(self.config), sum(array.nbytes for array in buffers))

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
        packed = self._packed
        arrays = (packed.w_qkv, packed.w_out, packed.w_gate_up, packed.w_down, packed.w_head)
        return sum(array.nbytes for array in arrays)

    def step_bytes(self) -> int:
        """Bytes of them that a step reads, if it chooses tokens by the bytes of the LM head."""
        saved = self._w_head.nbytes - self._byte_head.nbytes if self._byte_head is not None else 0
        return self.weight_bytes() - saved

    def phases(self) -> dict[str, float]:
        """Seconds the first thread spent in each of PHASES since `reset_phases`, waiting for others included."""
        return dict(zip(PHASES, (self._clocks[0, :-1] * 1e-9).tolist(), strict=True))

    def reset_phases(self) -> None:
        """Begin to count anew."""
        self._clocks[:] = 0

    def allocate_kv(self, num_blocks: int) -> None:
        """Make room for `num_blocks` blocks of `block_size` tokens; all is written, so no step waits for a page."""
        c = self.config
        self._kv = zeros((c.num_hidden_layers, 0))  # the old one goes first
        per_block = c.num_key_value_heads * kv_block_size(c.head_dim, self._shape.value_width)
        self._kv = zeros((c.num_hidden_layers, num_blocks * per_block))
        self._kv.fill(0)

    def reserve(self, num_tokens: int) -> None:
        """Buffers for steps of up to `num_tokens` tokens."""

        def made(shapes: Shapes) -> dict[str, np.ndarray]:
            return {name: zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}

        self._scratch = Scratch(**made(scratch_shapes(self.config, self.max_model_len, self.num_threads, num_tokens)))
        self._choice: ChoiceScratch | None = None
        if self._byte_head is not None:
            choice = made(choice_shapes(self.config, self.num_threads, num_tokens))
            self._choice = ChoiceScratch(row_words=choice["row_integers"].view(np.int32), **choice)
        self._logits = zeros((0, self._w_head.shape[0] * PANEL_WIDTH))

    def forward(self, batch: FlatBatch) -> StepOutput:
        """Run one step; what is returned are views, valid until the next call of this object.

        With enough rows each thread computes sequences of its own, from the embedding to the last norm: then threads
        do not wait for each other between operations, and while one waits for memory another computes.
        """
        parts, rows = self._parts(batch), len(batch.logits_rows)
        first_rows = list(accumulate((len(part.token_ids) for part in parts), initial=0))
        first_logits = list(accumulate((len(part.logits_rows) for part in parts), initial=0))
        works = [
            tuple(self._work(part, first_row, first_logit, self.num_threads // len(parts)))
            for part, first_row, first_logit in zip(parts, first_rows, first_logits, strict=False)
        ]
        shape, weights, scratch = tuple(self._shape), tuple(self._weights), tuple(self._scratch)
        wanted, chosen = batch.logits_wanted, np.full(rows, NOT_PICKED)
        bounded = self._choice is not None and not self._steps_without_bounds
        picked = np.flatnonzero(~wanted) if bounded else chosen[:0]  # rows chosen without all their logits
        shared = zeros(COUNTER_STRIDE * (2 + COUNTERS_PER_PART * len(parts)), np.int64)
        choice: tuple[Any, ...] = (shared, self._clocks[0])
        if len(picked):
            assert self._byte_head is not None
            head = Head(self._w_head, self._byte_head.weights, self._byte_head.columns)
            first_picked = np.searchsorted(picked, first_logits)
            choice = (
                shared, self._clocks[0], picked, first_picked, self._shape.vocab, tuple(head), scratch,
                tuple(self._choice or ()), chosen,
            )  # fmt: skip
        finish = choose_rows if len(picked) else meet

        def run(thread: int, num_threads: int) -> None:
            if len(parts) > 1:
                part, of_part, threads = thread, 0, 1
            else:
                part, of_part, threads = 0, thread, num_threads
            run_step(
                of_part, threads, part, shape, weights, works[part], scratch, self._kv, self._clocks[part],
            )  # fmt: skip
            finish(thread, num_threads, *choice)

        self._crew.run(run)
        if len(picked):
            if shared[-COUNTER_STRIDE] > len(self._w_head) // 4 + _PAYING_PANELS * len(picked):
                self._steps_without_bounds = _PAUSE_STEPS
        elif not wanted.all():
            self._steps_without_bounds = max(0, self._steps_without_bounds - 1)
        return self._with_logits(self._scratch.final[:rows], chosen, wanted)

    def _with_logits(self, final: np.ndarray, chosen: np.ndarray, wanted: np.ndarray) -> ReadyOutput:
        """The step's output: logits of the rows that want them, and the argmax of those that nothing else chose."""
        logits, open_rows = self._logits[:0, : self._shape.vocab], chosen == NOT_PICKED
        if open_rows.any():
            computed = np.concatenate([np.flatnonzero(wanted), np.flatnonzero(open_rows & ~wanted)])
            in_order = len(computed) == len(final) and (wanted.all() or not wanted.any())
            logits, chosen[computed] = self._whole_rows(final if in_order else final[computed])
        return ReadyOutput(chosen, final, logits[: np.count_nonzero(wanted)])

    def _parts(self, batch: FlatBatch) -> list[FlatBatch]:
        """One for each thread, or the whole batch for all."""
        if self.num_threads == 1 or len(batch.token_ids) < _LEAST_ROWS_APART * self.num_threads:
            return [batch]
        parts = split(batch, self.num_threads, self._costs)
        return parts if min(len(part.token_ids) for part in parts) >= _LEAST_ROWS_APART else [batch]

    def _find_costs(self) -> Costs:
        """Of this model's sequences."""
        c, w = self.config, self._weights
        each_row = 2 * sum(array.size for array in (w.qkv, w.out, w.gate_up, w.down))  # FLOP
        read = 4 * c.num_hidden_layers * c.num_key_value_heads * (c.head_dim + self._shape.value_width)  # bytes
        attend = 2 * c.num_hidden_layers * c.num_attention_heads * (c.head_dim + self._shape.value_width)  # FLOP
        skipped = 2 * sum(array[0].size for array in (w.out, w.gate_up, w.down))  # FLOP
        return Costs(read=_FLOP_PER_BYTE * read / each_row, attend=attend / each_row, skipped=skipped / each_row)

    def _work(self, part: FlatBatch, first_row: int, first_logit: int, num_threads: int) -> Work:
        """What `run_step` computes of a part of a step, whose rows begin at these numbers, with so many threads."""
        tokens, kv_heads = tile_tokens(self.config), self._shape.num_kv_heads
        work = last = attention_work(part, tokens, kv_heads, num_threads)
        if len(part.logits_rows) < len(part.token_ids):
            last = attention_work(part, tokens, kv_heads, num_threads, logits_only=True)
        return Work(
            first_row, first_logit, part.token_ids, part.positions, part.slots, part.block_tables, part.logits_rows,
            work.tiles, work.items, work.written_first, last.tiles, last.items, last.written_first,
            zeros(COUNTER_STRIDE * (1 + COUNTERS_PER_LAYER * self.config.num_hidden_layers), np.int64),
        )  # fmt: skip

    def project(self, final: np.ndarray) -> np.ndarray:
        """Logits float32 [n, vocab] of n rows of `StepOutput.final`, bit for bit those of their own steps."""
        logits = np.empty((len(final), self._shape.vocab), np.float32)
        most = len(self._scratch.final)
        for first in range(0, len(final), most):
            part = slice(first, first + most)
            logits[part] = self._whole_rows(final[part])[0]
        return logits

    def _whole_rows(self, final: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [R, vocab], and the index of the largest, int64 [R]; -1 where there is NaN."""
        rows = len(final)
        if rows > self._logits.shape[0]:
            self._logits = zeros((rows, self._logits.shape[1]))
        chosen = np.empty(rows, np.int64)
        counters = zeros(2 * COUNTER_STRIDE, np.int64)
        self._crew.run(
            project_rows, counters, final, self._w_head, self._shape.vocab, tuple(self._scratch), self._logits, chosen,
            self._clocks[0],
        )  # fmt: skip
        return self._logits[:rows, : self._shape.vocab], chosen

    def log_normalisers(self, output: StepOutput) -> np.ndarray:
        """log(sum(exp(logits))) of each row of the last step's logits, float64 [W]."""
        out = np.empty(len(output.logits))
        self._crew.run(normalise_rows, np.zeros(COUNTER_STRIDE, np.int64), self._logits, self._shape.vocab, out)
        return out
