"""What the system said to safetensors, which tells it in words only, as the OSError that it was."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_NUMBER = re.compile(r"\(os error ([0-9]+)\)")


@contextmanager
def safetensors_as_os_errors(path: Path) -> Iterator[None]:
    """Errors of the system within the block, about the file at `path`, are OSErrors; others stay what they are."""
    try:
        yield
    except SafetensorError as error:
        found = _NUMBER.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None
