"""A copy of a model with one layer's weights changed: what is computed from it was stored nowhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from isologit.common.safetensors_errors import safetensors_as_os_errors
from isologit.errors import ModelError

_RELATIVE = 0.25  # of the weights' own spread: enough to change answers, too little to break the model


def perturbed_model(model: Path, target: Path, generator: np.random.Generator) -> str:
    """Write the copy into `target` and return the changed weight's name; other files are linked where possible.

    model: a Hugging Face folder with safetensors. Raises ModelError for anything else, OSError when the copy cannot
    be written.
    """
    shards = sorted(model.glob("*.safetensors"))
    if not shards:
        raise ModelError(f"{model}: the perturbed run needs a folder of safetensors")
    target.mkdir(parents=True, exist_ok=True)
    candidates = []
    for shard in shards:
        with shard.open("rb"):
            candidates += [(name, shard) for name in _names(shard) if name.endswith("mlp.down_proj.weight")]
    if not candidates:
        raise ModelError(f"{model}: holds no mlp.down_proj.weight to change")
    name, changed = candidates[int(generator.integers(len(candidates)))]
    for file in model.iterdir():
        if file.is_file() and file != changed:
            _link(file, target / file.name)
    tensors = load_file(changed)
    weight = tensors[name].to(torch.float32)
    noise = torch.from_numpy(generator.standard_normal(weight.shape, dtype=np.float32))
    tensors[name] = (weight + noise * (_RELATIVE * float(weight.std()))).to(tensors[name].dtype)
    with safetensors_as_os_errors(target / changed.name):
        save_file(tensors, target / changed.name, metadata={"format": "pt"})
    return name


def _names(shard: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as opened:
        return list(opened.keys())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
