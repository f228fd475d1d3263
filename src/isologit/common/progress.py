"""How far something long is, told to whoever shows it. Knows no terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from isologit.common.load_progress import LoadProgress


@dataclass(frozen=True)
class Progress:
    """done and total count requests; `fraction` counts output tokens, which is what takes the time."""

    done: int
    total: int
    fraction: float
    output_tokens: int = 0


class Observer(Protocol):
    """Is told of every stage, of progress within it, and in a line what a user should know before it is over.

    `progress` may be called from another thread.
    """

    def stage(self, name: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def note(self, text: str) -> None: ...
    def loading(self, progress: LoadProgress) -> None: ...


class Silent:
    """Shows nothing."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def progress(self, progress: Progress) -> None:
        """Something of it is done."""

    def note(self, text: str) -> None:
        """Something that should be known."""

    def loading(self, progress: LoadProgress) -> None:
        """Some of a model's bytes are loaded."""
