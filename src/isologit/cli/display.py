"""Progress on standard error: a bar on a terminal, a line every few seconds elsewhere, nothing when quiet.

Nothing is silent for more than five seconds: where a stage tells nothing, the time that it takes goes on.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from isologit.common.load_progress import LoadProgress
from isologit.common.progress import Observer, Silent
from isologit.common.progress import Progress as JobProgress

_LINE_EVERY_S = 4.0
_LOOK_EVERY_S = 0.5  # whether the last line is that old


@contextmanager
def display(*, quiet: bool) -> Iterator[Observer]:
    """Something to tell a run's stages to."""
    if quiet:
        yield Silent()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        with Lines().running() as lines:
            yield lines
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


class LoadPace:
    """Words for how far and how fast loading is; each kind of work has a pace of its own."""

    def __init__(self) -> None:
        self._doing = ""
        self._start, self._first_bytes = 0.0, 0

    def detail(self, progress: LoadProgress) -> str:
        """What is done, GiB, GiB per second and the time that is left."""
        now = time.monotonic()
        if progress.doing != self._doing:
            self._doing, self._start, self._first_bytes = progress.doing, now, progress.done_bytes
        done, total = progress.done_bytes / 2**30, progress.total_bytes / 2**30
        parts = [f"{progress.doing} {done:.1f}/{total:.1f} GiB"]
        rate = (progress.done_bytes - self._first_bytes) / 2**30 / max(1e-9, now - self._start)
        if rate > 0:
            parts.append(f"{rate:.2f} GiB/s")
            if progress.done_bytes < progress.total_bytes:
                parts.append(f"ETA {timedelta(seconds=round((total - done) / rate))}")
        return " · ".join(parts)


class Bars:
    """One bar for every stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._pace, self._load_pace = Pace(), LoadPace()

    def stage(self, name: str) -> None:
        """The last stage is over, the next one begins."""
        if self._task is not None:
            self._progress.update(self._task, total=1.0, completed=1.0)
            self._progress.stop_task(self._task)
        self._task = self._progress.add_task(name, total=None, detail="")
        self._pace, self._load_pace = Pace(), LoadPace()

    def progress(self, progress: JobProgress) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(
                self._task, total=1.0, completed=progress.fraction, detail=self._pace.detail(progress)
            )

    def note(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)

    def loading(self, progress: LoadProgress) -> None:
        """Move the bar; it begins anew with each kind of work."""
        if self._task is not None:
            self._progress.update(
                self._task,
                total=max(1, progress.total_bytes),
                completed=progress.done_bytes,
                detail=self._load_pace.detail(progress),
            )


class Lines:
    """One line for every stage, and one every few seconds within it; any thread may tell."""

    def __init__(self) -> None:
        self._stage = ""
        self._pace, self._load_pace = Pace(), LoadPace()
        self._start = self._shown = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[Lines]:
        """Says how long the stage has taken whenever nothing else was said for some seconds, until the block ends."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(_LOOK_EVERY_S):
                if self._stage:
                    self._say_if_due(lambda: f"{timedelta(seconds=round(time.monotonic() - self._start))}")

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def stage(self, name: str) -> None:
        """A stage begins."""
        with self._lock:
            self._stage, self._pace, self._load_pace = name, Pace(), LoadPace()
            self._start = self._shown = time.monotonic()
            print(f"{name} ...", file=sys.stderr, flush=True)

    def progress(self, progress: JobProgress) -> None:
        """Say so if the last line is some seconds old."""
        self._say_if_due(lambda: self._pace.detail(progress))

    def note(self, text: str) -> None:
        """A line of its own."""
        print(text, file=sys.stderr, flush=True)

    def loading(self, progress: LoadProgress) -> None:
        """Say so if the last line is some seconds old."""
        detail = self._load_pace.detail(progress)
        self._say_if_due(lambda: detail)

    def _say_if_due(self, words: Callable[[], str]) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._shown >= _LINE_EVERY_S:
                self._shown = now
                print(f"{self._stage}: {words()}", file=sys.stderr, flush=True)
