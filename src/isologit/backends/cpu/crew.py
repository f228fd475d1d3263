"""The threads of a model: as many as it was given, waiting for a function that all of them run."""

from __future__ import annotations

import threading
import weakref
from queue import SimpleQueue
from typing import Any

_LONGEST_GOODBYE_S = 5.0  # for a thread that is still in a step


class Crew:
    """Threads that run one compiled function together: the caller is number 0, the others wait for its call.

    They end with `close`, with this object, or when Python ends, whichever is first.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._inboxes: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(num_threads - 1)]
        threads = [
            threading.Thread(target=_serve, args=(number, num_threads, inbox), daemon=True, name=f"isologit-{number}")
            for number, inbox in enumerate(self._inboxes, start=1)
        ]
        for thread in threads:
            thread.start()
        self.close = weakref.finalize(self, _dismiss, self._inboxes, threads)

    def run(self, function: Any, *args: Any) -> None:
        """`function(thread, num_threads, *args)` on every thread; it must end with a barrier."""
        for inbox in self._inboxes:
            inbox.put((function, args))
        function(0, self.num_threads, *args)


def _serve(number: int, num_threads: int, inbox: SimpleQueue[Any]) -> None:
    while (call := inbox.get()) is not None:
        function, args = call
        function(number, num_threads, *args)
        del call, args  # NOTE: a waiting thread must not keep the last step's arrays alive


def _dismiss(inboxes: list[SimpleQueue[Any]], threads: list[threading.Thread]) -> None:
    for inbox in inboxes:
        inbox.put(None)
    for thread in threads:
        thread.join(_LONGEST_GOODBYE_S)
