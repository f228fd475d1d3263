"""Where this program keeps what it can make again. The only reader of the environment variables that move it."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`ISOLOGIT_CACHE`; else `isologit` within `XDG_CACHE_HOME`, or within `~/.cache`. It need not exist."""
    if own := os.environ.get("ISOLOGIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isologit"
