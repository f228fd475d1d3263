"""One pass over all weights: every block once, whatever the threads, and a hash that any order of blocks gives."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isologit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.checkpoints.hashing import row_blocks
from isologit.common.load_progress import LoadProgress
from isologit.common.workers import share
from isologit.config import ModelConfig
from isologit.errors import ModelError

CONFIG = ModelConfig(5000, 1024, 512, 1, 4, 2, 256)  # its embedding has more than one block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    checkpoint = dummy_checkpoint(CONFIG)
    save_file(dict(checkpoint.tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf_dict()))
    return folder


@pytest.mark.parametrize("num_threads", [1, 3])
def test_every_block_is_handed_on_once(folder: Path, num_threads: int) -> None:
    checkpoint = open_checkpoint(folder)
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in checkpoint.tensors.items()}
    lock = threading.Lock()

    def visit(name: str, first: int, block: torch.Tensor) -> None:
        with lock:
            rows = found[name][first : first + len(block)]
            assert rows.isnan().all()
            rows.copy_(block)

    checkpoint.read(visit, num_threads=num_threads)
    assert len(row_blocks(checkpoint.tensors.stored["lm_head.weight"])) > 1
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(found[name], tensor)
    assert checkpoint.sha256() == open_checkpoint(folder).sha256()


def test_the_hash_is_what_its_definition_says(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    lines = []
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        data, row = tensor.numpy().tobytes(), tensor[0].numel() * 4
        step = max(1, 4 * 2**20 // row // 64) * 64 * row
        blocks = [hashlib.sha256(data[i : i + step]).digest() for i in range(0, len(data), step)]
        lines.append(f"{name} float32 {list(tensor.shape)} {hashlib.sha256(b''.join(blocks)).hexdigest()}\n")
    assert checkpoint.sha256() == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_one_changed_bit_in_any_block_changes_the_hash(folder: Path, tmp_path: Path) -> None:
    before = open_checkpoint(folder).sha256()
    content = bytearray((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for place in (-1, len(content) // 2):
        content[place] ^= 1
        (tmp_path / "model.safetensors").write_bytes(content)
        assert open_checkpoint(tmp_path).sha256() != before
        content[place] ^= 1


def test_weights_in_memory_are_read_too(folder: Path) -> None:
    stored = open_checkpoint(folder)
    held = Checkpoint(stored.config, dict(stored.tensors), folder, "huggingface")
    assert held.sha256() == stored.sha256()


def test_progress_reaches_the_end(folder: Path) -> None:
    told: list[LoadProgress] = []
    checkpoint = open_checkpoint(folder)
    checkpoint.read(on_progress=told.append, doing="hashing")
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert told[-1] == LoadProgress("hashing", total, total)
    assert all(a.done_bytes <= b.done_bytes for a, b in itertools.pairwise(told))


def test_a_file_that_shrinks_is_noticed(folder: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 20)
    with pytest.raises(ModelError, match=r"model\.safetensors: became shorter while it was read; copy it again"):
        checkpoint.read()


def test_the_fingerprint_tells_changed_files_apart(folder: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    before = open_checkpoint(tmp_path).fingerprint()
    assert open_checkpoint(tmp_path).fingerprint() == before
    assert open_checkpoint(folder).fingerprint() != before  # another place: nothing says that it is the same
    (tmp_path / "model.safetensors").touch()
    assert open_checkpoint(tmp_path).fingerprint() != before


def test_the_first_error_of_many_threads_is_raised_and_ends_the_rest() -> None:
    begun = []

    def work(job: int) -> None:
        begun.append(job)
        if job == 2:
            raise ValueError(job)

    with pytest.raises(ValueError, match="2"):
        share(range(1_000_000), work, num_threads=3)
    assert len(begun) < 1_000_000


def test_blocks_of_a_row_wider_than_a_block() -> None:
    tensor = dummy_checkpoint(ModelConfig(100, 4096, 40_000, 1, 2, 2, 2048)).tensors.stored[
        "model.layers.0.mlp.down_proj.weight"
    ]
    blocks = row_blocks(tensor)
    assert [last - first for first, last in blocks] == [64] * 64
    assert np.prod(tensor.shape) * 4 == tensor.nbytes
