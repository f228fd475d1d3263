"""Safetensors files and how a folder lists them. Knows files and headers; names are judged elsewhere."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from isologit.checkpoints.raw_file import RawFile
from isologit.checkpoints.stored import StoredTensor
from isologit.config.model_config import read_json_object
from isologit.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILES = ("model.safetensors.index.json", "param_name_map.json")  # Hugging Face's and MindFormers'
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`, or [] when it holds none.

    Raises ModelError when the index is malformed, a shard it names is missing, or it is unclear which files to take.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return shard_files(folder / name)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise ModelError(f"{folder}: holds {len(files)} safetensors files but no {INDEX_FILES[0]}; add the index file")
    return files


def shard_files(index: Path) -> list[Path]:
    """The files an index names, beside it: `{"weight_map": {tensor: file}}` or just `{tensor: file}`.

    Raises ModelError when the index is malformed or a file is missing.
    """
    d = read_json_object(index)
    weight_map = d.get("weight_map", d)
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{index}: must map tensor names to file names; copy the index again")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: is missing, though {index.name} names it; copy all shards")
    return files


def read_safetensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Headers of all files; the tensors stay on disk. Raises ModelError for a damaged file or a name given twice."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # the library's own check of header, offsets and length
                pass
            raw = RawFile(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: is not a complete safetensors file ({error}); copy it again") from None
        header, start = _header(raw)
        for name, entry in header.items():
            if name in stored:
                raise ModelError(f"{file}: holds {name}, which {stored[name].file.name} holds too; keep one")
            dtype, first = entry["dtype"], start + entry["data_offsets"][0]
            stored[name] = StoredTensor(
                tuple(entry["shape"]), _DTYPES.get(dtype, dtype), file, partial(_read, raw, first)
            )
    return stored


def _header(raw: RawFile) -> tuple[dict[str, Any], int]:
    """Entries of all tensors, and where in the file their data begin."""
    size = bytearray(8)
    raw.read_into(0, size)
    text = bytearray(int.from_bytes(size, "little"))
    raw.read_into(len(size), text)
    header = json.loads(text)
    header.pop("__metadata__", None)
    return header, len(size) + len(text)


def _read(raw: RawFile, start: int, first_row: int, out: np.ndarray) -> None:
    raw.read_into(start + first_row * out.shape[1], out.reshape(-1))
