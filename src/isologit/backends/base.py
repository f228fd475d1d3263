"""What the engine asks of a device: a LLaMA over flat token batches, its paged keys and values, and what they cost."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from isologit.backends.batch import FlatBatch, StepOutput
from isologit.config import ModelConfig


class Backend(Protocol):
    """A loaded model on one device. Not thread-safe: one thread runs its steps.

    block_size: tokens of a block of keys and values.
    """

    config: ModelConfig
    block_size: int

    def allocate_kv(self, num_blocks: int) -> None:
        """Memory for the keys and values of so many blocks; what was there is lost."""
        ...

    def reserve(self, num_tokens: int) -> None:
        """Memory for steps of up to `num_tokens` tokens."""
        ...

    def forward(self, batch: FlatBatch) -> StepOutput:
        """Run one step; what is returned is valid until the next step."""
        ...

    def project(self, final: np.ndarray) -> np.ndarray:
        """Logits float32 [n, vocab] of n rows of `StepOutput.final`, bit for bit those of their own steps."""
        ...

    def log_normalisers(self, rows: int) -> np.ndarray:
        """log(sum(exp(logits))) of the first `rows` rows of logits of the last step, float64 [rows]."""
        ...

    def kv_bytes_per_block(self) -> int:
        """Bytes of one block's keys and values, over all layers."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a result file says of it: device, dtype, kernels, threads, bytes of weights and of a step."""
        ...

    def reset_phases(self) -> None:
        """Begin to count the seconds of each phase anew."""
        ...

    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase of the steps since `reset_phases`."""
        ...

    def close(self) -> None:
        """Free threads and memory; nothing may be called afterwards."""
        ...
