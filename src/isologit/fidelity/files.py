"""Habits every file of this room shares: hashes of tokens and of code, JSON without NaN."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from isologit.errors import UserError


class LogitsFileError(UserError):
    """A file or folder of logits cannot be read or paired."""


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
