"""Progress on standard error: a bar on a terminal, a line every few seconds elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from isologit.common.progress import Observer, Silent
from isologit.common.progress import Progress as JobProgress

_LINE_EVERY_S = 5.0


@contextmanager
def display(*, quiet: bool) -> Iterator[Observer]:
    """Something to tell a run's stages to."""
    if quiet:
        yield Silent()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (
        TextColumn("{task.description:<30}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bars(progress)


class Pace:
    """Words for how far and how fast the stage is."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def detail(self, progress: JobProgress) -> str:
        """Requests, tokens per second and the time that is left."""
        seconds = time.monotonic() - self._start
        parts = [f"{progress.done}/{progress.total} requests"]
        if progress.output_tokens:
            parts.append(f"{progress.output_tokens / seconds:,.0f} tokens/s")
        if 0 < progress.fraction < 1:
            left = timedelta(seconds=round(seconds / progress.fraction - seconds))
            parts.append(f"ETA {left}")
        return " · ".join(parts)


class Bars:
    """One bar for every stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._pace = Pace()

    def stage(self, name: str) -> None:
        """The last stage is over, the next one begins."""
        if self._task is not None:
            self._progress.update(self._task, total=1.0, completed=1.0)
            self._progress.stop_task(self._task)
        self._task = self._progress.add_task(name, total=None, detail="")
        self._pace = Pace()

    def progress(self, progress: JobProgress) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(
                self._task, total=1.0, completed=progress.fraction, detail=self._pace.detail(progress)
            )

    def note(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)


class Lines:
    """One line for every stage, and one every few seconds within it."""

    def __init__(self) -> None:
        self._stage = ""
        self._pace = Pace()
        self._shown = 0.0

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._stage, self._pace, self._shown = name, Pace(), time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)

    def progress(self, progress: JobProgress) -> None:
        """Say so if the last line is some seconds old or the stage is complete."""
        now = time.monotonic()
        if now - self._shown >= _LINE_EVERY_S:
            self._shown = now
            print(f"{self._stage}: {self._pace.detail(progress)}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line of its own."""
        print(text, file=sys.stderr, flush=True)
