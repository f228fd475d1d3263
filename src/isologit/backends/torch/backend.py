"""`Backend` over the plain torch model: a flat batch becomes tensors, results become numpy arrays."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import psutil
import torch
from torch import Tensor

from isologit.backends.base import LoadOptions, Memory
from isologit.backends.batch import FlatBatch, StepOutput
from isologit.backends.torch.model import Group, KVCache, Llama
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.checkpoints.stored import expected_shapes
from isologit.config import ModelConfig

_BLOCK_SIZE = 16
_HOST_MEMORY = ("cpu", "mps")  # devices that compute in it
_FLOAT32 = 4


def choose_device(device: str) -> torch.device:
    """The device that torch calls so; "auto" is the machine's accelerator, or the CPU if it has none."""
    if device != "auto":
        return torch.device(device)
    return torch.accelerator.current_accelerator() or torch.device("cpu")


class DeviceOutput:
    """A step's results on the device; reading one waits for all that was started there, and copies it."""

    def __init__(self, backend: TorchBackend, chosen: Tensor, final: Tensor, wanted: Tensor) -> None:
        self._backend, self._chosen, self._final, self._wanted = backend, chosen, final, wanted

    @cached_property
    def argmax(self) -> np.ndarray:
        """int64 [R]."""
        return self._backend.fetch(self._chosen)

    @cached_property
    def final(self) -> np.ndarray:
        """float32 [R, hidden]."""
        return self._backend.fetch(self._final)

    @cached_property
    def logits(self) -> np.ndarray:
        """float32 [W, vocab]."""
        return self._backend.fetch(self._wanted)


class TorchBackend:
    """LLaMA in eager torch, float32 throughout. Its products are the library's, whose rounding depends on the batch."""

    name: ClassVar[str] = "torch"
    overlaps_steps: ClassVar[bool] = True
    block_size = _BLOCK_SIZE
    numerics: ClassVar[tuple[str, ...]] = ("float32",)

    @classmethod
    def why_not(cls, device: str) -> str | None:
        """Why torch cannot use `device`; None if it can."""
        try:
            torch.zeros(1, device=choose_device(device)).add_(1)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            return f"torch cannot use {device} ({str(error).splitlines()[0]})"
        return None

    @classmethod
    def load(cls, checkpoint: Checkpoint, options: LoadOptions) -> TorchBackend:
        """Read all weights once, hashed on the way and widened to float32."""
        return cls(checkpoint, options)

    @classmethod
    def plan_memory(cls, config: ModelConfig, options: LoadOptions, num_tokens: int) -> Memory:
        """As `memory` after `reserve`; torch allocates what a step works in, so that part is an estimate."""
        weights = sum(math.prod(shape) for shape in expected_shapes(config).values())
        return Memory(weights * _FLOAT32, _kv_block_bytes(config), _step_bytes(config, num_tokens))

    @classmethod
    def own_memory(cls, device: str) -> int | None:
        """Free bytes of an accelerator."""
        chosen = choose_device(device)
        return None if chosen.type in _HOST_MEMORY else _free_bytes(chosen)

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self.config: ModelConfig = checkpoint.config
        self.device = choose_device(options.device)
        self._num_threads = options.num_threads
        self._model = Llama(self.config, _read(checkpoint, self.device, options), self.device)
        self._num_tokens, self._seconds = 1, 0.0
        self._chosen = torch.zeros(1, dtype=torch.int64, device=self.device)  # by the last step, [R]
        self.allocate_kv(0)

    @classmethod
    def product_rate(cls, num_threads: int) -> float | None:
        """Products are the library's."""
        return None

    def allocate_kv(self, num_blocks: int) -> None:
        """Memory for the keys and values of so many blocks; what was there is lost."""
        c = self.config
        self._cache: KVCache | None = None  # the old memory goes before the new comes
        shape = (c.num_hidden_layers, num_blocks * self.block_size, c.num_key_value_heads, c.head_dim)
        self._cache = KVCache(torch.zeros(shape, device=self.device), torch.zeros(shape, device=self.device))

    def reserve(self, num_tokens: int) -> None:
        """Torch allocates as it goes."""
        self._num_tokens = num_tokens

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Without gradients, on the threads that `load` was given; books the time."""
        start, threads = time.perf_counter(), torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(threads)
            self._seconds += time.perf_counter() - start

    def forward(self, batch: FlatBatch) -> StepOutput:
        """Run one step."""
        assert self._cache is not None
        with self._running():
            tokens, positions, slots, rows = (
                torch.from_numpy(array).to(self.device)
                for array in (batch.token_ids, batch.positions, batch.slots, batch.logits_rows)
            )
            if batch.token_ids.min() < 0:
                said = self._chosen[(-1 - tokens).clamp_min(0)].clamp_min(0)
                tokens = torch.where(tokens < 0, said, tokens)
            final = self._model.forward(tokens, positions, slots, self._groups(batch), self._cache, rows)
            logits = self._model.logits(final)  # [R, vocab]
            chosen = self._chosen = torch.where(logits.isnan().any(-1), -1, logits.argmax(-1))
            wanted = logits[torch.from_numpy(batch.logits_wanted).to(self.device)]
        return DeviceOutput(self, chosen, final, wanted)

    def fetch(self, tensor: Tensor) -> np.ndarray:
        """A tensor of a step as an array, when the step is over."""
        with self._running():
            array: np.ndarray = tensor.cpu().numpy()
        return array

    def _groups(self, batch: FlatBatch) -> list[Group]:
        """Sequences by their number of tokens."""
        first_row, counts, position = batch.sequences.T
        groups = []
        for count in np.unique(counts):
            members = np.flatnonzero(counts == count)
            rows = first_row[members, None] + np.arange(count)  # [G, n]
            context = np.arange((position[members] + count).max())  # [C]
            last = position[members, None] + np.arange(count)  # [G, n], a token sees all up to its own position
            # NOTE: blocks past a sequence's end may be any; nothing there is visible.
            blocks = batch.block_tables[batch.table_rows[members]][:, context // self.block_size]
            slots = blocks * self.block_size + context % self.block_size
            arrays = (rows, slots, context <= last[:, :, None])
            groups.append(Group(*(torch.from_numpy(array).to(self.device) for array in arrays)))
        return groups

    def project(self, final: np.ndarray) -> np.ndarray:
        """Logits float32 [n, vocab] of n rows of `StepOutput.final`."""
        with self._running():
            logits: np.ndarray = self._model.logits(torch.from_numpy(final).to(self.device)).cpu().numpy()
        return logits

    def log_normalisers(self, output: StepOutput) -> np.ndarray:
        """log(sum(exp(logits))) of each row of `output.logits`, float64 [W]."""
        normalisers: np.ndarray = torch.from_numpy(output.logits).double().logsumexp(-1).numpy()
        return normalisers

    def memory(self) -> Memory:
        """What is allocated now."""
        weights = sum(weight.nbytes for weight in self._model.weights())
        return Memory(weights, _kv_block_bytes(self.config), _step_bytes(self.config, self._num_tokens))

    def free_memory(self) -> int:
        """Bytes of the device's memory that nobody uses now."""
        return _free_bytes(self.device)

    def describe(self) -> dict[str, Any]:
        """What a result file says of it."""
        c = self.config
        products = _FLOAT32 * sum(
            math.prod(shape) for name, shape in expected_shapes(c).items() if len(shape) == 2 and "embed" not in name
        )
        products += _FLOAT32 * c.vocab_size * c.hidden_size if c.tie_word_embeddings else 0
        return {
            "device": str(self.device),
            "kernels": "torch",
            "compute_dtype": "float32",
            "weights_dtype": "float32",
            "weight_bytes": products,
            "step_bytes": products,
            "batch_invariant": False,
        }

    def reset_phases(self) -> None:
        """Begin to count anew."""
        self._seconds = 0.0

    def phases(self) -> dict[str, float]:
        """All of a step is one phase here."""
        return {"model": self._seconds}

    def close(self) -> None:
        """Free the memory."""
        del self._model, self._cache


def _read(checkpoint: Checkpoint, device: torch.device, options: LoadOptions) -> dict[str, torch.Tensor]:
    """All weights in float32 on the device, block by block, so that the host holds little of them."""
    tensors = {name: torch.empty(shape, device=device) for name, shape in expected_shapes(checkpoint.config).items()}

    def visit(name: str, first_row: int, block: torch.Tensor) -> None:
        tensors[name][first_row : first_row + len(block)].copy_(block)

    checkpoint.read(visit, num_threads=options.num_threads, on_progress=options.on_progress)
    return tensors


def _free_bytes(device: torch.device) -> int:
    """The host's, where torch does not know the device's."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return int(module.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _kv_block_bytes(config: ModelConfig) -> int:
    return 2 * _FLOAT32 * config.num_hidden_layers * _BLOCK_SIZE * config.num_key_value_heads * config.head_dim


def _step_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Of the largest that live at once: the residual and one layer's gate and up, or the logits."""
    per_token = 2 * config.hidden_size + max(3 * config.intermediate_size, config.vocab_size)
    return _FLOAT32 * num_tokens * per_token
