"""What the engine asks of a device: a LLaMA over flat token batches, its paged keys and values, and what they cost.

A backend is a class that follows `Backend`, in a folder of its own, with one line in `registry.py`. It knows devices,
weights and memory; it does not know requests, sampling, text or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from isologit.backends.batch import FlatBatch, StepOutput
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.common.load_progress import OnLoadProgress
from isologit.config import ModelConfig
from isologit.errors import ConfigError


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    max_model_len: most prompt and output tokens of one sequence. device: as in torch ("cpu", "cuda", "cuda:1", ...);
    "auto" leaves it to the backend. num_threads: of the host. weight_cache: whether weights may be kept on disk in the
    form that the backend needs. kv_cache_memory_bytes: bound of keys and values, if one was given; without, a backend
    may take half of the memory that is free. numerics: one of the backend's `numerics`, "auto" for the first.
    on_progress: is told how far loading is.
    """

    max_model_len: int
    num_threads: int
    device: str = "auto"
    weight_cache: bool = True
    kv_cache_memory_bytes: int | None = None
    numerics: str = "auto"
    on_progress: OnLoadProgress | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of the device's memory.

    weights: of the model, in whatever forms they are kept. kv_block: keys and values of one block, over all layers.
    step_buffers: what steps of the reserved size work in.
    """

    weights: int
    kv_block: int
    step_buffers: int


class Backend(Protocol):
    """A loaded model on one device. Not thread-safe: one thread runs its steps, in the order of its calls.

    name: its name in the registry. overlaps_steps: whether the host may prepare and start a step while the last one
    runs, see `forward`. block_size: tokens of one block of keys and values. numerics: names of what it can keep of
    float32 values, the default first. Every method may assume that its arguments are valid; only `load` raises errors
    that a user should read.
    """

    name: ClassVar[str]
    overlaps_steps: ClassVar[bool]
    block_size: int
    numerics: ClassVar[tuple[str, ...]]
    config: ModelConfig

    @classmethod
    def why_not(cls, device: str) -> str | None:
        """Why this machine cannot run this backend on `device` ("auto": on any), in a few words; None if it can."""
        ...

    @classmethod
    def load(cls, checkpoint: Checkpoint, options: LoadOptions) -> Backend:
        """The model, ready for steps of one token once `allocate_kv` was called.

        Raises ModelError for a model that this backend cannot compute.
        """
        ...

    @classmethod
    def plan_memory(cls, config: ModelConfig, options: LoadOptions, num_tokens: int) -> Memory:
        """What `memory` will say of such a model after `reserve(num_tokens)`, before anything is loaded."""
        ...

    @classmethod
    def own_memory(cls, device: str) -> int | None:
        """Bytes that are free in the device's own memory; None where it computes in the host's."""
        ...

    @classmethod
    def product_rate(cls, num_threads: int) -> float | None:
        """FLOP/s that its own matrix products could reach at most, measured now; None if they are a library's."""
        ...

    def allocate_kv(self, num_blocks: int) -> None:
        """Memory for the keys and values of blocks 0 to `num_blocks` - 1; what was there is lost."""
        ...

    def reserve(self, num_tokens: int) -> None:
        """Buffers for steps of up to `num_tokens` tokens."""
        ...

    def forward(self, batch: FlatBatch) -> StepOutput:
        """Run one step: write the keys and values of its tokens, attend, and give what `batch` wants.

        The step may still be running when this returns, but `batch` is not read any more; reading a field of the output
        waits for it. What is read is valid until the next `forward` or `project`.

        If `overlaps_steps`, the next `forward` may come before the output is read, with token ids that this step is
        still to choose. `argmax` and `final` can then be read until the `forward` after that one, whatever `project`
        does meanwhile, and reading them should wait for this step alone.
        """
        ...

    def project(self, final: np.ndarray) -> np.ndarray:
        """Logits float32 [n, vocab] of n rows of `StepOutput.final`, bit for bit those of their own steps."""
        ...

    def log_normalisers(self, output: StepOutput) -> np.ndarray:
        """log(sum(exp(logits))) of each row of `output.logits`, float64 [W]; `output` is the last step's."""
        ...

    def memory(self) -> Memory:
        """What is allocated now."""
        ...

    def free_memory(self) -> int:
        """Bytes of the device's memory that nobody uses now."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a result file says of it.

        "device", "kernels", "compute_dtype", "weights_dtype" are strings; "weight_bytes" is what all products read,
        "step_bytes" what a decode step reads of it.
        """
        ...

    def reset_phases(self) -> None:
        """Begin to count `phases` anew."""
        ...

    def phases(self) -> dict[str, float]:
        """Seconds by phase of the steps since `reset_phases`; `job/profile.py` says which names it knows."""
        ...

    def close(self) -> None:
        """Free threads and memory; no other method may be called afterwards."""
        ...


def scheme_name(numerics: str, backend: type[Backend]) -> str:
    """The scheme of that name, the default for "auto". Raises ConfigError naming what the backend has."""
    if numerics == "auto":
        return backend.numerics[0]
    if numerics not in backend.numerics:
        raise ConfigError(
            f'numerics "{numerics}" is unknown to the {backend.name} backend; it has {", ".join(backend.numerics)}'
        )
    return numerics
