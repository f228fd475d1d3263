"""Safetensors files and Hugging Face model folders. Knows files and headers; names are judged elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from isologit.config.model_config import ModelConfig, read_json_object
from isologit.errors import ModelError
from isologit.model.stored import StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def read_config(folder: Path) -> ModelConfig:
    """`config.json` of a model folder, with the end tokens of `generation_config.json` where that names any.

    Hugging Face's `generate` stops at the latter's tokens. Raises ModelError.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: has no config.json; add the model's own")
    d = read_json_object(file)
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = read_json_object(generation).get("eos_token_id")
        if eos is not None:
            d["eos_token_id"] = eos
    return ModelConfig.from_hf_dict(d, file)


def safetensors_files(folder: Path, index_name: str = INDEX_FILE) -> list[Path]:
    """The safetensors files that make up the model in `folder`, or [] when it holds none.

    Raises ModelError when the index is malformed, a shard it names is missing, or it is unclear which files to take.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / index_name).is_file():
        return shard_files(folder / index_name)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise ModelError(f"{folder}: holds {len(files)} safetensors files but no {index_name}; add the index file")
    return files


def shard_files(index: Path) -> list[Path]:
    """The files an index (`{"weight_map": {name: file}}`) names, beside it. Raises ModelError."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{index}: weight_map must map tensor names to file names; copy the index again")
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
            handle: Any = safe_open(file, framework="pt")
            for name in handle.keys():  # noqa: SIM118 - the handle is not a mapping
                if name in stored:
                    raise ModelError(f"{file}: holds {name}, which {stored[name].file.name} holds too; keep one")
                view = handle.get_slice(name)
                dtype = str(view.get_dtype())
                stored[name] = StoredTensor(
                    tuple(view.get_shape()), _DTYPES.get(dtype, dtype), file, partial(_load, handle, name)
                )
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: is not a complete safetensors file ({error}); copy it again") from None
    return stored


def _load(handle: Any, name: str) -> Any:
    return handle.get_tensor(name)
