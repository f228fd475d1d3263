"""Packed weights kept on disk, found again by what they were packed from and how they lie. Knows no layout.

A file holds the packed bytes and, behind them, what they are: a JSON object with a CRC-32 of every chunk, its SHA-256,
its length and a mark. So a file that was cut off has no end, and one that was damaged has a chunk that does not fit.
Beside the files lies, for every checkpoint whose weights were kept, the hash that was found when it was read, by the
checkpoint's fingerprint: that is how a hash is known without reading the checkpoint again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isologit.checkpoints.raw_file import RawFile
from isologit.common.cache_folder import cache_folder
from isologit.common.files import json_text, write_atomically, write_text
from isologit.common.load_progress import LoadProgress, OnLoadProgress
from isologit.common.workers import share
from isologit.errors import ModelError

_CHUNK_BYTES = 8 << 20
_MARK = b"isologit weights"
_END_BYTES = 32 + 8 + len(_MARK)  # digest, length, mark
_SUFFIX = ".weights"
_FREE_SHARE, _FREE_BYTES = 0.05, 4 << 30  # of the disk: so much stays free, the larger of both
_FORGOTTEN_S = 24 * 3600.0  # a partial file of that age has no writer any more
_MOST_THREADS = 16
_SYNC_EVERY = 64  # chunks


@dataclass(frozen=True)
class Kept:
    """Packed weights in the cache. title: what they were packed from. last_used_s: as `time.time()`."""

    path: Path
    title: str
    sha256: str
    layout: str
    facts: dict[str, Any]
    num_bytes: int
    checksums: Sequence[int]
    last_used_s: float

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.path.stem


class NotKeptError(Exception):
    """Packed weights could not be kept; the message says why. Nothing is left behind."""


class DamagedError(Exception):
    """A kept file is not what was written."""


class WeightCache:
    """The folder of packed weights. Several processes may use it at a time; files appear whole."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (cache_folder() if folder is None else folder) / "weights"

    def find(self, fingerprint: str, layout: str) -> Kept | None:
        """The packed weights of the checkpoint with this fingerprint in this layout, or None."""
        try:
            known = json.loads(self._known(fingerprint).read_text(encoding="utf-8"))
            kept = self._read_end(self._path(known["sha256"], layout))
        except (OSError, ValueError, KeyError, TypeError, DamagedError):
            return None
        return kept if (kept.sha256, kept.layout) == (known["sha256"], layout) else None

    def read(self, kept: Kept, out: np.ndarray, *, num_threads: int, on_progress: OnLoadProgress | None = None) -> None:
        """Fill `out`, uint8 [`kept.num_bytes`], by all cores. Raises DamagedError, with `out` half filled."""
        if len(out) != kept.num_bytes:
            raise DamagedError(f"{kept.path}: has another size than this layout")
        try:
            raw = RawFile(kept.path)

            def read(number: int, chunk: np.ndarray) -> None:
                raw.read_into(number * _CHUNK_BYTES, chunk)
                if zlib.crc32(chunk.data) != kept.checksums[number]:
                    raise DamagedError(f"{kept.path}: is damaged")

            _each_chunk(out, read, num_threads, on_progress, "reading packed weights")
            os.utime(kept.path)  # NOTE: the time of the last change is the time of the last use
        except (OSError, ModelError) as error:
            raise DamagedError(f"{kept.path}: cannot be read ({error})") from None

    def keep(
        self,
        weights: np.ndarray,
        *,
        title: str,
        fingerprint: str,
        sha256: str,
        layout: str,
        facts: dict[str, Any],
        num_threads: int,
        on_progress: OnLoadProgress | None = None,
    ) -> Path:
        """Write packed weights, uint8 [n], unless they are there already, and remember the checkpoint's hash.

        Raises NotKeptError when the disk has no room to spare or fails.
        """
        path = self._path(sha256, layout)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_forgotten()
            if not self._is_whole(path):
                self._require_room(len(weights))
                end = {"title": title, "sha256": sha256, "layout": layout, "facts": facts}
                write_atomically(path, lambda partial: _write(partial, weights, end, num_threads, on_progress))
            known = self._known(fingerprint)
            known.parent.mkdir(exist_ok=True)
            write_text(known, [json_text({"sha256": sha256, "title": title})])
        except OSError as error:
            raise NotKeptError(f"{self.folder}: cannot be written ({error.strerror})") from None
        return path

    def list(self) -> Sequence[Kept]:
        """All that is kept, the last used first. Files that are not whole are left out."""
        return sorted(self._files(), key=lambda kept: -kept.last_used_s)

    def clear(self, name: str | None = None) -> Sequence[Path]:
        """Remove everything, or what has this name or title; returns the files that went. Raises OSError."""
        if name is None:
            gone = sorted(self.folder.glob(f"*{_SUFFIX}"))
            leftovers = [*self.folder.glob(f".*{_SUFFIX}.*"), *self._known("x").parent.glob("*.json")]
        else:
            gone, leftovers = [kept.path for kept in self._files() if name in (kept.name, kept.title)], []
        for path in [*gone, *leftovers]:
            path.unlink(missing_ok=True)
        return gone

    def _path(self, sha256: str, layout: str) -> Path:
        return self.folder / f"{sha256[:16]}-{hashlib.sha256(layout.encode()).hexdigest()[:8]}{_SUFFIX}"

    def _known(self, fingerprint: str) -> Path:
        return self.folder / "checkpoints" / f"{fingerprint[:32]}.json"

    def _files(self) -> Iterator[Kept]:
        for path in self.folder.glob(f"*{_SUFFIX}"):
            if not path.name.startswith("."):
                try:
                    yield self._read_end(path)
                except (OSError, DamagedError):
                    continue

    def _is_whole(self, path: Path) -> bool:
        try:
            self._read_end(path)
        except (FileNotFoundError, DamagedError):
            return False
        return True

    def _read_end(self, path: Path) -> Kept:
        """What the file says of itself. Raises OSError or DamagedError."""
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END_BYTES))
            end = file.read()
            length = int.from_bytes(end[32:40], "little")
            if len(end) != _END_BYTES or end[40:] != _MARK or length > size - _END_BYTES:
                raise DamagedError(f"{path}: is not whole")
            file.seek(size - _END_BYTES - length)
            text = file.read(length)
        if hashlib.sha256(text).digest() != end[:32]:
            raise DamagedError(f"{path}: is damaged")
        d = json.loads(text)
        num_bytes = size - _END_BYTES - length
        if len(d["checksums"]) != -(-num_bytes // _CHUNK_BYTES):
            raise DamagedError(f"{path}: is damaged")
        used = path.stat().st_mtime
        return Kept(path, d["title"], d["sha256"], d["layout"], d["facts"], num_bytes, d["checksums"], used)

    def _require_room(self, num_bytes: int) -> None:
        disk = shutil.disk_usage(self.folder)
        reserve = max(_FREE_BYTES, int(_FREE_SHARE * disk.total))
        if disk.free - num_bytes < reserve:
            raise NotKeptError(
                f"{self.folder}: {num_bytes / 2**30:.1f} GiB would leave less than {reserve / 2**30:.1f} GiB of "
                f"{disk.free / 2**30:.1f} GiB free"
            )

    def _remove_forgotten(self) -> None:
        for partial in self.folder.glob(f".*{_SUFFIX}.*"):
            try:
                if time.time() - partial.stat().st_mtime > _FORGOTTEN_S:
                    partial.unlink()
            except FileNotFoundError:  # its writer is done, or another process was faster
                continue


def _write(
    path: Path, weights: np.ndarray, end: dict[str, Any], num_threads: int, on_progress: OnLoadProgress | None
) -> None:
    """The file's content. Raises OSError."""
    checksums = [0] * -(-len(weights) // _CHUNK_BYTES)
    with path.open("wb") as file:
        descriptor = file.fileno()
        os.posix_fallocate(descriptor, 0, max(1, len(weights)))  # a full disk says so here

        def write(number: int, chunk: np.ndarray) -> None:
            left, place = chunk.data, number * _CHUNK_BYTES
            checksums[number] = zlib.crc32(left)
            while left:
                written = os.pwrite(descriptor, left, place)
                left, place = left[written:], place + written
            if number % _SYNC_EVERY == _SYNC_EVERY - 1:
                os.fdatasync(descriptor)  # so that no long silence waits at the end

        _each_chunk(weights, write, num_threads, on_progress, "keeping packed weights")
        text = json_text({**end, "checksums": checksums}).encode()
        file.seek(len(weights))
        file.write(text + hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + _MARK)
        file.flush()
        os.fsync(descriptor)


def _each_chunk(
    memory: np.ndarray,
    work: Callable[[int, np.ndarray], None],
    num_threads: int,
    on_progress: OnLoadProgress | None,
    doing: str,
) -> None:
    """`work(number, chunk)` for every chunk of the memory, by several threads."""
    done = [0] * -(-len(memory) // _CHUNK_BYTES)

    def one(number: int) -> None:
        chunk = memory[number * _CHUNK_BYTES : (number + 1) * _CHUNK_BYTES]
        work(number, chunk)
        done[number] = len(chunk)

    def tick() -> None:
        if on_progress is not None:
            on_progress(LoadProgress(doing, sum(done), len(memory)))

    share(range(len(done)), one, num_threads=min(num_threads, _MOST_THREADS), tick=tick)
