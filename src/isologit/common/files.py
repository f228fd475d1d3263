"""Files written whole or not at all: a reader sees the old one or the new one, never half. Knows no format but JSON."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isologit.errors import OutputFolderError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary path)` make the file, then move it to `path`. Raises OSError, leaving what was there."""
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


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Replace a file by pieces of text in UTF-8, on the disk before it gets its name. Raises OSError.

    A lone surrogate, which JSON may hold and UTF-8 may not, is escaped the way JSON escapes it.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write)


def json_text(value: Any) -> str:
    """The value as an indented JSON document. Raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace a file by the value as JSON, making its folder if need be. Raises OutputFolderError when it cannot."""
    text = json_text(value)
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, [text])


def require_writable(path: Path) -> None:
    """Make the folder of a file that is to be written later. Raises OutputFolderError when it could not be now."""
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputFolderError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
