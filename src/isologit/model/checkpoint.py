"""A model's config and weights under one naming, whichever files they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from isologit.config import PRESETS, ModelConfig
from isologit.errors import ModelError
from isologit.model.huggingface import read_config, read_safetensors, safetensors_files
from isologit.model.stored import LazyTensors, StoredTensor, checked_tensors, stored_dtype

Kind = Literal["huggingface", "mindformers", "dummy"]


@dataclass
class Checkpoint:
    """Config and weights. `tensors` is lazy: Hugging Face names, stored dtype, linear weights [out, in].

    `source` is the folder or file it was opened from. A tied model has no `lm_head.weight`.
    """

    config: ModelConfig
    tensors: Mapping[str, torch.Tensor]
    source: Path
    kind: Kind
    _sha256: str | None = field(default=None, init=False, repr=False, compare=False)

    def sha256(self) -> str:
        """Hash of all names, shapes, dtypes and values: the same for the same weights in any file layout.

        Reads every weight once (the first call only).
        """
        if self._sha256 is None:
            digest = hashlib.sha256()
            for name in sorted(self.tensors):
                tensor = self.tensors[name]
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
            self._sha256 = digest.hexdigest()
        return self._sha256


def open_checkpoint(path: str | Path, *, qkv_layout: str | None = None) -> Checkpoint:
    """Open a Hugging Face folder. Names, shapes and types of all weights are checked; nothing is read yet.

    Raises ModelError naming what is wrong.
    """
    path = Path(path)
    if not path.exists():
        hint = '; for random weights of that shape use load_format "dummy"' if str(path) in PRESETS else ""
        raise ModelError(f"{path}: no such file or folder{hint}")
    config = read_config(path)
    return _checkpoint(config, read_safetensors(safetensors_files(path)), path, "huggingface")


def _checkpoint(config: ModelConfig, stored: Mapping[str, StoredTensor], source: Path, kind: Kind) -> Checkpoint:
    tensors = checked_tensors(stored, config, source)
    return Checkpoint(replace(config, dtype=stored_dtype(tensors)), LazyTensors(tensors), source, kind)
