"""How far the loading of a model is, told to whoever shows it. Knows no terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadProgress:
    """`done_bytes` of the `total_bytes` of what `doing` says, such as "packing weights", are done."""

    doing: str
    done_bytes: int
    total_bytes: int


# Called by the thread that loads, a few times a second while bytes move, and when each kind of work is complete.
OnLoadProgress = Callable[[LoadProgress], None]
