"""The toy backend as a device of its own: steps run on another thread, in the order in which they were started."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar

import numpy as np
from tests.backends.toy.backend import ToyBackend

from isologit.backends.base import LoadOptions
from isologit.backends.batch import FlatBatch, StepOutput
from isologit.checkpoints.checkpoint import Checkpoint


class FutureOutput:
    """A step that is held back until the next one is started or its results are read, whichever comes first."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.is_followed = False  # whether the next step was started before the results were read
        self.step: Future[StepOutput] = Future()

    def _wait(self) -> StepOutput:
        self.released.set()
        return self.step.result()

    @property
    def argmax(self) -> np.ndarray:
        return self._wait().argmax

    @property
    def final(self) -> np.ndarray:
        return self._wait().final

    @property
    def logits(self) -> np.ndarray:
        return self._wait().logits


class ThreadBackend(ToyBackend):
    """started: all steps, in order."""

    name: ClassVar[str] = "thread"
    overlaps_steps: ClassVar[bool] = True
    started: ClassVar[list[FutureOutput]] = []

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        super().__init__(checkpoint, options)
        self.started.clear()
        self._device = ThreadPoolExecutor(1)
        self._chosen = np.zeros(0, np.int64)

    def forward(self, batch: FlatBatch) -> StepOutput:
        if self.started and not self.started[-1].released.is_set():
            self.started[-1].is_followed = True
            self.started[-1].released.set()
        output = FutureOutput()
        self.started.append(output)
        # NOTE: the host may change the block tables once this returns
        batch = replace(batch, block_tables=batch.block_tables.copy())
        output.step = self._device.submit(self._compute, batch, output.released)
        return output

    def _compute(self, batch: FlatBatch, released: threading.Event) -> StepOutput:
        released.wait(60)
        unknown = batch.token_ids < 0
        tokens = batch.token_ids.copy()
        tokens[unknown] = self._chosen[-1 - tokens[unknown]]
        output = super().forward(replace(batch, token_ids=tokens))
        self._chosen = output.argmax
        return output

    def close(self) -> None:
        self._device.shutdown()
        super().close()
