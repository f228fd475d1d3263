"""`Backend` on an NVIDIA GPU: packs a flat batch into one copy, replays a CUDA graph, and hands out what is read.

Under Triton's interpreter (`TRITON_INTERPRET=1`) the same kernels run on the CPU, slowly, without graphs.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import psutil
import torch

from isologit.backends.base import LoadOptions, Memory, scheme_name
from isologit.backends.batch import FlatBatch, StepOutput
from isologit.backends.cuda.numerics import SCHEMES, Numerics
from isologit.backends.cuda.sizes import BLOCK_SIZE, buffer_bytes, kv_block_bytes, product_bytes, weight_bytes
from isologit.backends.cuda.tiles import BUCKETS, bucket_of
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.config import ModelConfig
from isologit.errors import ModelError

if TYPE_CHECKING:
    from isologit.backends.cuda.model import KVCache, StepInputs

_HEADER = 4  # integers before the tokens: number of tiles, table width, and two to stay aligned
_LEAST_BUFFER_ROWS = 512
_LEAST_CAPABILITY = (9, 0)  # FP8 conversions, and the tensor memory accelerator


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _numerics(options: LoadOptions) -> Numerics:
    """The scheme asked for.

    NOTE: Triton's interpreter rounds to FP8 wrongly where a mantissa carries, so it keeps float16 there.
    """
    scheme = SCHEMES[scheme_name(options.numerics, CUDABackend)]
    stand_in = _interpreted() and scheme.kv_low == torch.float8_e4m3fn
    return replace(scheme, kv_low=torch.float16) if stand_in else scheme


def _torch_device(device: str) -> torch.device:
    return torch.device("cuda" if device == "auto" else device)


def _buffer_rows(num_tokens: int) -> int:
    """Rows that buffers are made for: so many that they are seldom made twice."""
    return max(_LEAST_BUFFER_ROWS, bucket_of(num_tokens))


class Results(NamedTuple):
    """Where a step's results are kept while the next one runs; there are two, in turn.

    chosen: int32 [T], in pinned memory. final: float32 [T, hidden]. over: the event after which both are there; None
    under the interpreter.
    """

    chosen: torch.Tensor
    final: torch.Tensor
    over: Any


class DeviceOutput:
    """A step's results on the device; reading one waits for the step and copies it."""

    def __init__(self, backend: CUDABackend, results: Results, wanted: np.ndarray) -> None:
        self._backend, self._results, self._wanted = backend, results, wanted
        self._argmax: np.ndarray | None = None
        self._final: np.ndarray | None = None
        self._logits: np.ndarray | None = None

    @property
    def argmax(self) -> np.ndarray:
        """int64 [R]."""
        if self._argmax is None:
            self._backend.wait(self._results)
            self._argmax = self._results.chosen[: len(self._wanted)].numpy().astype(np.int64)
        return self._argmax

    @property
    def final(self) -> np.ndarray:
        """float32 [R, hidden]."""
        if self._final is None:
            self._final = self._backend.fetch_final(self._results, len(self._wanted))
        return self._final

    @property
    def logits(self) -> np.ndarray:
        """float32 [W, vocab]."""
        if self._logits is None:
            self._logits = self._backend.fetch("logits", torch.from_numpy(np.flatnonzero(self._wanted)))
        return self._logits


class CUDABackend:
    """LLaMA with float16 weights; what is kept of activations, keys and values is a scheme of `numerics.py`."""

    name: ClassVar[str] = "cuda"
    overlaps_steps: ClassVar[bool] = True
    block_size = BLOCK_SIZE
    numerics: ClassVar[tuple[str, ...]] = tuple(SCHEMES)

    @classmethod
    def why_not(cls, device: str) -> str | None:
        """Why this machine cannot run it; None if it can."""
        if device != "auto" and not device.startswith("cuda") and not (_interpreted() and device == "cpu"):
            return f"it runs on CUDA devices, not on {device}"
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton is not installed (pip install triton)"
        if _interpreted():
            return None
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        index = _torch_device(device).index or 0
        if index >= torch.cuda.device_count():
            return f"there are {torch.cuda.device_count()} CUDA devices, and {device} is not one of them"
        if torch.cuda.get_device_capability(index) < _LEAST_CAPABILITY:
            return "it needs a GPU of compute capability 9.0 or more"
        return None

    @classmethod
    def load(cls, checkpoint: Checkpoint, options: LoadOptions) -> CUDABackend:
        """Read all weights to the device."""
        return cls(checkpoint, options)

    @classmethod
    def plan_memory(cls, config: ModelConfig, options: LoadOptions, num_tokens: int) -> Memory:
        """What `memory` will say after `reserve(num_tokens)`."""
        rows = _buffer_rows(num_tokens)
        return Memory(
            weight_bytes(config, options.max_model_len),
            kv_block_bytes(config, _numerics(options).kv_bytes),
            buffer_bytes(config, rows),
        )

    @classmethod
    def own_memory(cls, device: str) -> int | None:
        """Free bytes of the GPU."""
        return None if _interpreted() else int(torch.cuda.mem_get_info(_torch_device(device))[0])

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        from isologit.backends.cuda.model import Llama, tile_tokens

        self.config: ModelConfig = checkpoint.config
        if self.config.num_attention_heads // self.config.num_key_value_heads > 64:
            raise ModelError("the cuda backend takes at most 64 query heads for a key/value head")
        self._interpret = _interpreted()
        self.device = torch.device("cpu") if self._interpret else _torch_device(options.device)
        self._scheme, self._numerics = scheme_name(options.numerics, CUDABackend), _numerics(options)
        self._max_model_len = options.max_model_len
        self._kv_bounded = options.kv_cache_memory_bytes is not None
        self._model = Llama(
            self.config, checkpoint.tensors, self.device, options.max_model_len, self._numerics.activation_terms
        )
        self._tile_tokens = tile_tokens(self.config)
        self._copied: Any = self._event()
        # NOTE: results are copied beside the steps' own stream, where a copy would wait for the step that runs ahead.
        self._beside: Any = None if self._interpret else torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._cache: KVCache | None = None
        self._rows, self._num_blocks, self._seconds = 0, 0, 0.0
        self.allocate_kv(0)
        self.reserve(1)

    def _event(self) -> Any:
        return None if self._interpret else torch.cuda.Event()  # type: ignore[no-untyped-call]

    @classmethod
    def product_rate(cls, num_threads: int) -> float | None:
        """Products are the library's."""
        return None

    def allocate_kv(self, num_blocks: int) -> None:
        """Memory for the keys and values of so many blocks, and of one more for rows that pad a step.

        Without a bound the first blocks asked for bring half of the free memory with them: graphs hold its address, so
        a larger demand would capture all of them anew.
        """
        from isologit.backends.cuda.model import KVCache

        if self._cache is not None and num_blocks <= self._num_blocks:
            return
        c = self.config
        self._settle()
        self._graphs.clear()
        self._cache = None  # the old memory goes before the new comes
        if num_blocks and not self._interpret and not self._kv_bounded:
            num_blocks = max(num_blocks, self.free_memory() // 2 // kv_block_bytes(c, self._numerics.kv_bytes))
        shape = (c.num_hidden_layers, num_blocks + 1, 2, c.num_key_value_heads, BLOCK_SIZE, c.head_dim)
        high = torch.empty(shape, dtype=torch.float16, device=self.device)
        low = self._numerics.kv_low
        self._cache = KVCache(high, None if low is None else torch.empty(shape, dtype=low, device=self.device))
        self._num_blocks = num_blocks
        self._capture()

    def reserve(self, num_tokens: int) -> None:
        """Buffers and graphs for steps of up to `num_tokens` tokens."""
        if _buffer_rows(num_tokens) <= self._rows:
            return
        self._rows = _buffer_rows(num_tokens)
        self._settle()
        self._graphs.clear()
        self._model.reserve(self._rows)
        blocks_each = -(-self._max_model_len // BLOCK_SIZE)
        size = _HEADER + 8 * self._rows + self._rows * blocks_each
        pinned = self.device.type == "cuda"
        self._packed = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self._inputs = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._results = [
            Results(torch.zeros(self._rows, dtype=torch.int32, pin_memory=pinned), kept, self._event())
            for kept in self._model.buffers["kept"]
        ]
        self._capture()

    def _step_inputs(self, rows: int) -> StepInputs:
        """Views of the integers of a step of `rows` rows, a bucket."""
        from isologit.backends.cuda.model import StepInputs

        x, first = self._inputs, _HEADER
        tokens, positions, slots, wanted = (x[first + i * rows : first + (i + 1) * rows] for i in range(4))
        tiles, tables = x[first + 4 * rows : first + 8 * rows], x[first + 8 * rows :]
        return StepInputs(x[0:1], x[1:2], tokens, positions, slots, wanted, tiles, tables)

    def _capture(self) -> None:
        """A graph for every bucket of rows, once memory and buffers are there."""
        if self._interpret or not self._num_blocks or self._rows < 1:
            return
        assert self._cache is not None
        self._inputs.zero_()
        self._settle()
        for rows in reversed([bucket for bucket in BUCKETS if bucket <= self._rows]):
            step = self._step_inputs(rows)
            self._model.launch(step, rows, self._cache)  # compiles what is not compiled yet
            self._settle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._model.launch(step, rows, self._cache)
            self._pool = self._pool or graph.pool()
            self._graphs[rows] = graph

    def forward(self, batch: FlatBatch) -> StepOutput:
        """Start one step; it runs on while the host goes on."""
        assert self._cache is not None
        start = time.perf_counter()
        rows = bucket_of(len(batch.token_ids))
        if self._copied is not None:
            self._copied.synchronize()  # the last step's integers have left the memory that this one's go to
        size = self._pack(batch, rows)
        self._inputs[:size].copy_(self._packed[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        graph = self._graphs.get(rows)
        if graph is not None:
            graph.replay()
        else:
            self._model.launch(self._step_inputs(rows), rows, self._cache)
        results, buffers, wanted = self._results[0], self._model.buffers, len(batch.logits_rows)
        self._results.reverse()
        results.final[:wanted].copy_(buffers["final"][:wanted])
        results.chosen[:wanted].copy_(buffers["chosen"][:wanted], non_blocking=True)
        if results.over is not None:
            results.over.record()
        self._seconds += time.perf_counter() - start
        return DeviceOutput(self, results, batch.logits_wanted)

    def _pack(self, batch: FlatBatch, rows: int) -> int:
        """The step's integers into pinned memory; returns how many."""
        packed, count = self._packed.numpy(), len(batch.token_ids)
        columns = packed[_HEADER : _HEADER + 4 * rows].reshape(4, rows)
        columns[:, count:] = np.array([0, 0, self._num_blocks * BLOCK_SIZE, 0])[:, None]  # the spare block
        columns[0, :count], columns[1, :count], columns[2, :count] = batch.token_ids, batch.positions, batch.slots
        columns[3, : len(batch.logits_rows)] = batch.logits_rows
        columns[3, len(batch.logits_rows) :] = 0
        first_row, counts, position = batch.sequences.T
        per_sequence = -(-counts // self._tile_tokens)
        owner = np.repeat(np.arange(len(counts)), per_sequence)
        skipped = (np.arange(len(owner)) - np.repeat(np.cumsum(per_sequence) - per_sequence, per_sequence)) * (
            self._tile_tokens
        )
        tiles = packed[_HEADER + 4 * rows : _HEADER + 8 * rows].reshape(rows, 4)
        tiles[: len(owner), 0] = first_row[owner] + skipped
        tiles[: len(owner), 1] = np.minimum(counts[owner] - skipped, self._tile_tokens)
        tiles[: len(owner), 2] = position[owner] + skipped
        tiles[: len(owner), 3] = owner
        width = -(-int((position + counts).max()) // BLOCK_SIZE)
        packed[0], packed[1] = len(owner), width
        first = _HEADER + 8 * rows
        size = first + len(counts) * width
        packed[first:size].reshape(len(counts), width)[...] = batch.block_tables[batch.table_rows, :width]
        return size

    def _settle(self) -> None:
        """Until all that was started is over."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wait(self, results: Results) -> None:
        """Until the step with these results is over; the one behind it may still run."""
        start = time.perf_counter()
        if results.over is not None:
            results.over.synchronize()
        self._seconds += time.perf_counter() - start

    def fetch_final(self, results: Results, count: int) -> np.ndarray:
        """The first rows of what a step's LM head read, float32 [count, hidden]."""
        self.wait(results)
        with nullcontext() if self._beside is None else torch.cuda.stream(self._beside):
            fetched: np.ndarray = results.final[:count].cpu().numpy()
        return fetched

    def fetch(self, name: str, rows: Any) -> np.ndarray:
        """Rows of a buffer of the last step, float32 [n, features]."""
        buffer = self._model.buffers[name]
        features = self.config.vocab_size if name == "logits" else buffer.shape[1]
        fetched: np.ndarray = buffer[rows, :features].cpu().numpy()
        return fetched

    def project(self, final: np.ndarray) -> np.ndarray:
        """Logits float32 [n, vocab] of n rows of `StepOutput.final`, bit for bit those of their own steps."""
        buffers = self._model.buffers
        logits = np.empty((len(final), self.config.vocab_size), np.float32)
        for first in range(0, len(final), self._rows):
            part = final[first : first + self._rows]
            rows = bucket_of(len(part))
            buffers["final"][: len(part)] = torch.from_numpy(part).to(self.device)
            self._model.split_final(rows)
            self._model.launch_head(rows)
            logits[first : first + self._rows] = self.fetch("logits", slice(0, len(part)))
        return logits

    def log_normalisers(self, output: StepOutput) -> np.ndarray:
        """log(sum(exp(logits))) of each row of `output.logits`, float64 [W]."""
        normalisers: np.ndarray = torch.from_numpy(output.logits).to(self.device).double().logsumexp(-1).cpu().numpy()
        return normalisers

    def memory(self) -> Memory:
        """What is allocated now."""
        weights = weight_bytes(self.config, self._max_model_len)
        return Memory(
            weights,
            kv_block_bytes(self.config, self._numerics.kv_bytes),
            buffer_bytes(self.config, self._rows),
        )

    def free_memory(self) -> int:
        """Bytes of the device's memory that nobody uses now."""
        if self.device.type != "cuda":
            return int(psutil.virtual_memory().available)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + cached

    def describe(self) -> dict[str, Any]:
        """What a result file says of it."""
        products, found = product_bytes(self.config), self._numerics
        name = "cpu, Triton's interpreter" if self._interpret else torch.cuda.get_device_name(self.device)
        return {
            "device": str(self.device),
            "device_name": name,
            "kernels": "triton",
            "numerics": self._scheme,
            "compute_dtype": f"float16{' pairs' if found.activation_terms == 2 else ''}, float32 accumulation",
            "kv_dtype": "float16" + ("" if found.kv_low is None else f" and {found.kv_low}".replace("torch.", "")),
            "weights_dtype": "float16",
            "weight_bytes": products,
            "step_bytes": products,
            "batch_invariant": not self._interpret,  # NumPy's products are not
        }

    def reset_phases(self) -> None:
        """Begin to count anew."""
        self._seconds = 0.0

    def phases(self) -> dict[str, float]:
        """A graph is one phase."""
        return {"model": self._seconds}

    def close(self) -> None:
        """Free the device's memory."""
        self._settle()
        self._graphs.clear()
        del self._model, self._cache
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
