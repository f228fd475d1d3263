"""Habits every file of this room shares: atomic writing, hashes of tokens and of code, JSON without NaN."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from isologit.errors import UserError


class LogitsFileError(UserError):
    """A file or folder of logits cannot be read or paired."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary path)` make the file, then move it to `path`: a reader sees all of it or nothing."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def token_hash(token_ids: Sequence[int]) -> str:
    """SHA-256 (hexadecimal) of token ids written in decimal with commas between them."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def code_hash(package: Path | None = None) -> str:
    """SHA-256 over the names and contents of a package's `.py` files, in the order of their names.

    package: a folder; this package (`isologit`) when None.
    """
    root = package or Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def json_number(value: float) -> float | None:
    """The number, or None where JSON has no name for it (NaN, infinity)."""
    return value if math.isfinite(value) else None
