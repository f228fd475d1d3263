"""A file whose bytes are read from any place, by any thread. Knows no format."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

from isologit.errors import ModelError


class RawFile:
    """An open file. Its bytes are read into the caller's memory, so none of it counts as memory of this process.

    Raises OSError when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, start: int, out: Any) -> None:
        """Fill `out`, a writable buffer of bytes, from byte `start` on. Raises ModelError when the file ends before."""
        view = memoryview(out)
        while len(view):
            try:
                count = os.preadv(self._descriptor, [view], start)
            except OSError as error:
                raise ModelError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from None
            if not count:
                raise ModelError(f"{self.path}: became shorter while it was read; copy it again")
            view, start = view[count:], start + count
