"""Weights from the cache are those of the checkpoint; whatever is wrong with the cache, the checkpoint is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isologit.backends.cpu import loading
from isologit.backends.cpu.loading import load_weights
from isologit.backends.cpu.packing import PackedWeights, pack
from isologit.checkpoints import weight_cache
from isologit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.checkpoints.weight_cache import WeightCache
from isologit.config import ModelConfig

CONFIG = ModelConfig(300, 64, 48, 2, 4, 2, 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(dict(dummy_checkpoint(CONFIG).tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf_dict()))
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own that takes small models too."""
    monkeypatch.setenv("ISOLOGIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "LEAST_CACHED_BYTES", 0)
    monkeypatch.setattr(weight_cache, "_FREE_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for every time that a checkpoint is read."""
    calls: list[str] = []
    read = Checkpoint.read

    def counted(self: Checkpoint, *args: object, **options: object) -> None:
        calls.append(self.title)
        read(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read", counted)
    return calls


def load(folder: Path, *, use_cache: bool = True) -> tuple[Checkpoint, PackedWeights]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, load_weights(checkpoint, num_threads=2, use_cache=use_cache)


def test_the_second_start_reads_no_checkpoint(folder: Path, reads: list[str]) -> None:
    checkpoint, weights = load(folder)
    again, cached = load(folder)
    assert reads == [str(folder)]
    assert again.sha256() == checkpoint.sha256() == open_checkpoint(folder).sha256()
    assert np.array_equal(weights.memory, cached.memory)
    assert (weights.byte_head is None) == (cached.byte_head is None)


def test_opting_out(folder: Path, home: Path, reads: list[str]) -> None:
    load(folder, use_cache=False)
    load(folder, use_cache=False)
    assert len(reads) == 2
    assert not home.exists()


def test_random_weights_are_kept_by_seed(home: Path, reads: list[str]) -> None:
    made, again, other = (
        load_weights(dummy_checkpoint(CONFIG, seed=seed), num_threads=2, use_cache=True) for seed in (1, 1, 2)
    )
    assert len(reads) == 2
    assert np.array_equal(made.memory, again.memory)
    assert not np.array_equal(made.memory, other.memory)


def test_small_models_leave_nothing(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("ISOLOGIT_CACHE", str(home))
    load(folder)
    assert not home.exists()


def test_changed_weights_are_read_again(folder: Path, reads: list[str]) -> None:
    load(folder)
    tensors = dict(open_checkpoint(folder).tensors)
    tensors["model.norm.weight"] = torch.zeros(64)
    save_file(tensors, folder / "model.safetensors")
    checkpoint, weights = load(folder)
    assert len(reads) == 2
    assert not weights.final_norm.any()
    assert checkpoint.sha256() == open_checkpoint(folder).sha256()


def _flip(content: bytearray) -> None:
    content[1000] ^= 1


def _cut(content: bytearray) -> None:
    del content[-100:]


def _empty(content: bytearray) -> None:
    content.clear()


@pytest.mark.parametrize("damage", [_flip, _cut, _empty])
def test_a_damaged_cache_is_made_again(
    folder: Path, reads: list[str], damage: Callable[[bytearray], None], caplog: pytest.LogCaptureFixture
) -> None:
    load(folder)
    (kept,) = WeightCache().list()
    content = bytearray(kept.path.read_bytes())
    damage(content)
    kept.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        _, weights = load(folder)
    assert np.array_equal(weights.memory, pack(open_checkpoint(folder)).memory)
    _, cached = load(folder)
    assert len(reads) == 3  # at first, after the damage, and by this test; the last load read the cache
    assert np.array_equal(cached.memory, weights.memory)
    assert ("the weights are packed again" in caplog.text) == (damage is _flip)


def test_a_disk_without_room_is_a_warning(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_cache, "_FREE_BYTES", 1 << 60)
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "packed weights are not kept for the next start" in caplog.text
    assert WeightCache().list() == []
    home.joinpath("weights").rmdir()
    home.rmdir()
    home.write_text("a file where the folder should be")
    load(folder)
