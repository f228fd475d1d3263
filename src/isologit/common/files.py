"""Files written whole or not at all: a reader sees the old one or the new one, never half. Knows no format but JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, [text])
    except OSError as error:
        raise OutputFolderError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
