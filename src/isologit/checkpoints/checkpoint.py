"""A model's config and weights under one naming, whichever files they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from isologit.checkpoints.config_files import read_config
from isologit.checkpoints.hashing import model_digest
from isologit.checkpoints.huggingface import read_safetensors, safetensors_files, shard_files
from isologit.checkpoints.mindformers import check_qkv_layout, is_mindformers, to_huggingface
from isologit.checkpoints.mindspore_ckpt import read_mindspore_ckpt
from isologit.checkpoints.stored import LazyTensors, StoredTensor, checked_tensors, in_memory, stored_dtype
from isologit.checkpoints.streaming import Visit, read_weights
from isologit.common.load_progress import OnLoadProgress
from isologit.config import PRESETS, ModelConfig
from isologit.errors import ModelError

Kind = Literal["huggingface", "mindformers", "dummy"]
_PICKLES = (".bin", ".pth", ".pt")


@dataclass
class Checkpoint:
    """Config and weights. `tensors` is lazy: Hugging Face names, stored dtype, linear weights [out, in].

    `source` is the folder or file it was opened from, `title` what a user knows it by. A tied model has no
    `lm_head.weight`.
    """

    config: ModelConfig
    tensors: Mapping[str, torch.Tensor]
    source: Path
    kind: Kind
    title: str = ""
    _sha256: str | None = field(default=None, init=False, repr=False, compare=False)

    def read(
        self,
        visit: Visit | None = None,
        *,
        num_threads: int | None = None,
        on_progress: OnLoadProgress | None = None,
        doing: str = "reading weights",
    ) -> None:
        """Hand every block of every weight to `visit` (`streaming.read_weights`), and hash them on the way.

        Raises ModelError for a file that cannot be read.
        """
        stored = self._stored()
        digests = read_weights(stored, visit, num_threads=num_threads, on_progress=on_progress, doing=doing)
        self._sha256 = model_digest(stored, digests)

    def sha256(self) -> str:
        """Hash of all names, shapes, dtypes and values: the same for the same weights in any file layout.

        Known at once after `read`, and for random weights, which are told apart by what they are made from; otherwise
        every weight is read once, by all cores.
        """
        if self._sha256 is None:
            self.read()
        assert self._sha256 is not None
        return self._sha256

    def fingerprint(self) -> str:
        """Hash of what can be known of the weights without reading them all.

        Of files these are paths, sizes, times of the last change, tensors and a few samples of the bytes; so files that
        are changed without any of these changing keep their fingerprint. Raises OSError when a file cannot be read.
        """
        stored = self._stored()
        digest = hashlib.sha256(json.dumps(self.config.to_hf_dict(), sort_keys=True).encode())
        for name, tensor in stored.items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.digest}\n".encode())
            digest.update(_edges(tensor))
        for file in sorted({tensor.file for tensor in stored.values() if tensor.digest is None}):
            facts = file.stat()
            digest.update(f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def adopt_sha256(self, sha256: str) -> None:
        """Take the hash that was found when the same fingerprint was read before."""
        self._sha256 = sha256

    def _stored(self) -> dict[str, StoredTensor]:
        if isinstance(self.tensors, LazyTensors):
            return self.tensors.stored
        return in_memory(self.tensors, self.source)


def _edges(tensor: StoredTensor) -> bytes:
    """First and last row of what is in a file."""
    if tensor.digest is not None:
        return b""
    rows = np.empty((2, tensor.row_bytes), np.uint8)
    tensor.read(0, rows[:1])
    tensor.read(tensor.num_rows - 1, rows[1:])
    return rows.tobytes()


def open_checkpoint(path: str | Path, *, config: str | Path | None = None, qkv_layout: str | None = None) -> Checkpoint:
    """Open a Hugging Face folder, a MindFormers folder, or one `.safetensors` or `.ckpt` file.

    `config` is a `config.json` or MindFormers YAML to use instead of the one beside the weights. `qkv_layout`
    ("concat" or "interleaved") is needed for MindFormers checkpoints with fused matrices and means nothing to others.
    Names, shapes and types of all weights are checked; their values are read when they are asked for.
    Raises ModelError naming what is wrong, ConfigError for an unknown `qkv_layout`.
    """
    check_qkv_layout(qkv_layout)
    path = Path(path)
    if not path.exists():
        hint = '; for random weights of that shape use load_format "dummy"' if str(path) in PRESETS else ""
        raise ModelError(f"{path}: no such file or folder{hint}")
    stored = _read_folder(path) if path.is_dir() else _read_file(path)
    folder = path if path.is_dir() else path.parent
    model_config = read_config(folder, None if config is None else Path(config))
    kind: Kind = "huggingface"
    if is_mindformers(stored):
        kind, stored = "mindformers", to_huggingface(stored, model_config, path, qkv_layout=qkv_layout)
    tensors = checked_tensors(stored, model_config, path)
    model_config = replace(model_config, dtype=stored_dtype(tensors))
    return Checkpoint(model_config, LazyTensors(tensors), path, kind, str(path.resolve()))


def _read_folder(folder: Path) -> dict[str, StoredTensor]:
    if files := safetensors_files(folder):
        return read_safetensors(files)
    if files := _ckpt_files(folder):
        stored: dict[str, StoredTensor] = {}
        for file in files:
            stored.update(read_mindspore_ckpt(file))
        return stored
    if any(file.suffix in _PICKLES for file in folder.iterdir()):
        raise ModelError(f"{folder}: holds only PyTorch .bin or .pth weights; convert them to safetensors")
    hint = '; for random weights of the shape use load_format "dummy"' if (folder / "config.json").is_file() else ""
    raise ModelError(f"{folder}: holds no .safetensors and no .ckpt weights{hint}")


def _read_file(file: Path) -> dict[str, StoredTensor]:
    if file.suffix == ".safetensors":
        return read_safetensors([file])
    if file.suffix == ".ckpt":
        return read_mindspore_ckpt(file)
    if file.suffix in _PICKLES:
        raise ModelError(f"{file}: PyTorch .bin and .pth weights are not read; convert them to safetensors")
    raise ModelError(f"{file}: is not a checkpoint; give the model's folder, a .safetensors or a .ckpt file")


def _ckpt_files(folder: Path) -> list[Path]:
    """The `.ckpt` files of the model in `folder`. Raises ModelError when it is unclear which to take."""
    indexes = sorted(folder.glob("*.ckpt.index.json"))
    if len(indexes) == 1:
        return shard_files(indexes[0])
    files = sorted(folder.glob("*.ckpt"))
    if len(files) > 1:
        raise ModelError(f"{folder}: holds {len(files)} .ckpt files and no single index; give the path of one")
    return files
