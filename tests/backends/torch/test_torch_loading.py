"""How the plain backend reads a checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from isologit.backends.base import LoadOptions
from isologit.backends.torch.backend import TorchBackend
from isologit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from isologit.checkpoints.stored import LazyTensors, StoredTensor
from isologit.workload import demo_model_path


def watched(path: Path, rows: Counter[str]) -> Checkpoint:
    """The checkpoint, which counts the rows that are read of each of its tensors."""
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint.tensors, LazyTensors)

    def count(name: str, tensor: StoredTensor) -> StoredTensor:
        def read(first: int, out: np.ndarray) -> None:
            rows[name] += len(out)
            tensor.read(first, out)

        return replace(tensor, read=read, mapped=None)

    stored = {name: count(name, tensor) for name, tensor in checkpoint.tensors.stored.items()}
    return replace(checkpoint, tensors=LazyTensors(stored))


def test_every_weight_is_read_once_with_its_hash() -> None:
    """The hash that a result needs comes with the weights; making it alone reads them all: the inverse."""
    rows: Counter[str] = Counter()
    checkpoint = watched(demo_model_path(), rows)
    backend = TorchBackend.load(checkpoint, LoadOptions(max_model_len=64, num_threads=2, device="cpu"))
    known = checkpoint.sha256()
    plain = open_checkpoint(demo_model_path())
    assert rows == {name: len(tensor) for name, tensor in plain.tensors.items()}
    assert known == plain.sha256()
    assert torch.equal(backend._model.embedding, plain.tensors["model.embed_tokens.weight"].float())
    backend.close()
    again: Counter[str] = Counter()
    watched(demo_model_path(), again).sha256()
    assert again == rows
