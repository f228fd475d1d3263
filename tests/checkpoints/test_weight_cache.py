"""Packed weights on disk: found again, whole or not at all, refused when they are not what was written."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isologit.checkpoints import weight_cache
from isologit.checkpoints.weight_cache import DamagedError, NotKeptError, WeightCache
from isologit.common.cache_folder import cache_folder
from isologit.common.load_progress import LoadProgress

SIZE = (2 << 20) + 12_345  # several chunks, the last one not full
WEIGHTS = np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint8)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache, "_CHUNK_BYTES", 1 << 19)
    monkeypatch.setattr(weight_cache, "_SYNC_EVERY", 2)
    monkeypatch.setattr(weight_cache, "_FREE_BYTES", 0)
    monkeypatch.setattr(weight_cache, "_FREE_SHARE", 0.0)


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path)


def keep(cache: WeightCache, weights: np.ndarray = WEIGHTS, **changes: Any) -> Path:
    given = {"title": "models/one", "fingerprint": "f" * 64, "sha256": "a" * 64, "layout": "wide", "facts": {"b": True}}
    return cache.keep(weights, **{**given, **changes}, num_threads=3)


def read(cache: WeightCache, fingerprint: str = "f" * 64) -> np.ndarray:
    kept = cache.find(fingerprint, "wide")
    assert kept is not None
    out = np.zeros(kept.num_bytes, np.uint8)
    cache.read(kept, out, num_threads=3)
    return out


def test_what_is_kept_comes_back(cache: WeightCache) -> None:
    assert cache.find("f" * 64, "wide") is None
    path = keep(cache)
    assert np.array_equal(read(cache), WEIGHTS)
    kept = cache.find("f" * 64, "wide")
    assert kept is not None
    assert (kept.path, kept.title, kept.sha256, kept.facts) == (path, "models/one", "a" * 64, {"b": True})
    assert [p for p in cache.folder.iterdir() if p.name.startswith(".")] == []


def test_another_checkpoint_or_layout_is_not_found(cache: WeightCache) -> None:
    keep(cache)
    assert cache.find("e" * 64, "wide") is None
    assert cache.find("f" * 64, "narrow") is None


def test_the_same_weights_elsewhere_share_a_file(cache: WeightCache) -> None:
    first = keep(cache)
    written = first.stat().st_mtime_ns
    assert keep(cache, fingerprint="e" * 64, title="models/copy") == first
    assert first.stat().st_mtime_ns == written
    assert np.array_equal(read(cache, "e" * 64), WEIGHTS)


@pytest.mark.parametrize("size", [0, 10, SIZE // 2, SIZE, -1])
def test_a_file_that_was_cut_off_is_not_found(cache: WeightCache, size: int) -> None:
    path = keep(cache)
    content = path.read_bytes()
    path.write_bytes(content[:size])
    assert cache.find("f" * 64, "wide") is None
    assert cache.list() == []


@pytest.mark.parametrize("place", [0, SIZE // 2, SIZE - 1, SIZE + 20])
def test_one_changed_bit_is_noticed(cache: WeightCache, place: int) -> None:
    path = keep(cache)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    kept = cache.find("f" * 64, "wide")
    if place >= SIZE:  # what the file says of itself
        assert kept is None
        return
    assert kept is not None
    with pytest.raises(DamagedError, match="is damaged"):
        cache.read(kept, np.zeros(SIZE, np.uint8), num_threads=2)


def test_an_interrupted_writer_leaves_nothing(cache: WeightCache) -> None:
    def interrupt(progress: LoadProgress) -> None:
        raise KeyboardInterrupt

    given = {"title": "t", "fingerprint": "f" * 64, "sha256": "a" * 64, "layout": "wide", "facts": {}}
    with pytest.raises(KeyboardInterrupt):
        cache.keep(WEIGHTS, **given, num_threads=1, on_progress=interrupt)  # type: ignore[arg-type]
    assert list(cache.folder.iterdir()) == []


def test_writers_at_the_same_time_do_not_disturb_each_other(cache: WeightCache) -> None:
    threads = [threading.Thread(target=keep, args=(cache,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(read(cache), WEIGHTS)
    assert len(cache.list()) == 1


def test_a_full_disk_is_said_and_leaves_nothing(cache: WeightCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NotKeptError, match=r"cannot be written \(No space left on device\)"):
        keep(cache)
    assert list(cache.folder.iterdir()) == []


def test_the_disk_keeps_a_reserve(cache: WeightCache, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(weight_cache, "_FREE_BYTES", 4 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(50 << 30, 46 << 30, 4 << 30))
    with pytest.raises(NotKeptError, match=r"would leave less than 4\.0 GiB of 4\.0 GiB free"):
        keep(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(50 << 30, 44 << 30, 6 << 30))
    keep(cache)


def test_partial_files_of_dead_writers_go(cache: WeightCache) -> None:
    keep(cache)
    old, young = cache.folder / ".x.weights.old", cache.folder / ".x.weights.young"
    for path in (old, young):
        path.write_bytes(b"x")
    long_ago = time.time() - 48 * 3600
    os.utime(old, (long_ago, long_ago))
    keep(cache, sha256="b" * 64)
    assert (old.exists(), young.exists()) == (False, True)


def test_list_and_clear(cache: WeightCache) -> None:
    first, second = keep(cache), keep(cache, WEIGHTS[:100], sha256="b" * 64, title="two", fingerprint="e" * 64)
    os.utime(second, (0, 0))
    assert [kept.title for kept in cache.list()] == ["models/one", "two"]
    os.utime(first, (0, 0))
    read(cache, "e" * 64)  # a use is remembered
    assert [kept.title for kept in cache.list()] == ["two", "models/one"]
    assert cache.clear("nothing") == []
    assert cache.clear("two") == [second]
    assert cache.clear(first.stem) == [first]
    keep(cache)
    assert len(cache.clear()) == 1
    assert cache.list() == []
    assert cache.find("f" * 64, "wide") is None


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ISOLOGIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "isologit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "isologit"
    monkeypatch.setenv("ISOLOGIT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
