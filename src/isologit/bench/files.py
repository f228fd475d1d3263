"""Writing a result file whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from isologit.errors import OutputFolderError


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the value as JSON, making its folder if need be. Raises OutputFolderError when it cannot."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            # A lone surrogate, which JSON may hold and UTF-8 may not, is escaped the way JSON escapes it.
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputFolderError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
