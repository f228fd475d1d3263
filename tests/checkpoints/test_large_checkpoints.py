"""Checkpoints of more than 2 GiB are loaded with little memory beside the packed weights, from files and cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.mindspore_writer import mindformers_names, write_mindspore_ckpt
from transformers import LlamaConfig, LlamaForCausalLM

from isologit.backends.cpu.packing import packed_bytes
from isologit.checkpoints.checkpoint import open_checkpoint
from isologit.checkpoints.stored import LazyTensors
from isologit.config import ModelConfig

CONFIG = ModelConfig(32000, 2048, 8192, 16, 16, 16, 128, dtype="float16")
_GIB = 1 << 30
_LOAD = """
import json, resource, sys
from isologit.backends.cpu.loading import load_weights
from isologit.checkpoints.checkpoint import open_checkpoint
checkpoint, held = open_checkpoint(sys.argv[1]), []
if sys.argv[2] == "hold":  # more than may be held beside the weights
    read = checkpoint.read
    def read_and_hold(visit, **options):
        def both(name, first, block):
            if sum(tensor.nbytes for tensor in held) < 5 << 28:
                held.append(block.clone())
            visit(name, first, block)
        read(both, **options)
    checkpoint.read = read_and_hold
told = []
weights = load_weights(checkpoint, num_threads=2, use_cache=sys.argv[2] != "hold", on_progress=told.append)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
norms = weights.input_norms[:, 0].tolist()
doing = sorted({progress.doing for progress in told})
print(json.dumps({"peak": peak, "norms": norms, "sha256": checkpoint.sha256(), "doing": doing}))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Shards by transformers; all zero but for one number in each norm, so that writing is quick."""
    folder = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf_dict())).half()
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.zero_()
        for number, layer in enumerate(model.model.layers):
            layer.input_layernorm.weight[0] = number
    model.save_pretrained(folder, max_shard_size="1GB")
    del model
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 2 * _GIB
    yield folder
    shutil.rmtree(folder)


def load(path: Path, cache: Path, how: str = "") -> dict[str, Any]:
    """Load in a process of its own, as nothing else would tell its peak."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path), how],
        env={**os.environ, "ISOLOGIT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["norms"] == list(range(CONFIG.num_hidden_layers))
    return found


def test_shards_of_transformers(folder: Path, tmp_path: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 2
    first, second = load(folder, tmp_path), load(folder, tmp_path)
    shutil.rmtree(tmp_path)
    assert first["doing"] == ["keeping packed weights", "packing weights"]
    assert second["doing"] == ["reading packed weights"]
    assert first["sha256"] == second["sha256"]
    for found in (first, second):
        assert found["peak"] < packed_bytes(CONFIG) + _GIB


def test_the_measurement_sees_what_is_held(folder: Path, tmp_path: Path) -> None:
    assert load(folder, tmp_path, "hold")["peak"] > packed_bytes(CONFIG) + _GIB


def test_a_file_of_mindspore(folder: Path, tmp_path: Path) -> None:
    stored = open_checkpoint(folder).tensors.stored
    renamed = LazyTensors(mindformers_names(stored))
    write_mindspore_ckpt(tmp_path / "llama.ckpt", renamed, part_bytes=100 << 20, crc=True)
    shutil.copy(folder / "config.json", tmp_path)
    assert (tmp_path / "llama.ckpt").stat().st_size > 2 * _GIB
    found = load(tmp_path / "llama.ckpt", tmp_path / "cache")
    shutil.rmtree(tmp_path)
    assert found["peak"] < packed_bytes(CONFIG) + _GIB
