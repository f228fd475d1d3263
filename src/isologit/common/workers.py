"""Threads that share a list of jobs. Knows nothing of what the jobs are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Job = TypeVar("Job")

_TICK_S = 0.25


def share(
    jobs: Iterable[Job], work: Callable[[Job], object], *, num_threads: int, tick: Callable[[], None] | None = None
) -> None:
    """`work(job)` for every job, begun in their order, on `num_threads` threads.

    `tick` is called by the calling thread a few times a second, and once at the end. What a job raises, the first of
    them if several do, is raised here once the jobs in progress are over; jobs that were not begun are left out.
    """
    team = _Team(iter(jobs), work)
    threads = [threading.Thread(target=team.serve, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(_TICK_S)
                if tick is not None:
                    tick()
    finally:  # also when the caller is interrupted
        team.stopped = True
        for thread in threads:
            thread.join()
    if team.error is not None:
        raise team.error
    if tick is not None:
        tick()


class _Team:
    """What the threads of one `share` have in common."""

    def __init__(self, jobs: Iterator[Job], work: Callable[[Job], object]) -> None:
        self._jobs, self._work = jobs, work
        self._lock = threading.Lock()
        self.stopped = False
        self.error: BaseException | None = None

    def serve(self) -> None:
        """Jobs until there are none left, or one failed."""
        while not self.stopped:
            try:
                with self._lock:
                    job = next(self._jobs)
                self._work(job)
            except StopIteration:
                return
            except BaseException as error:
                with self._lock:
                    self.error = self.error or error
                self.stopped = True
