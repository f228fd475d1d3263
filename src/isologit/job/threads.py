"""How many threads the reference's library may use, so that the baseline gets the number that suits it best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_REPEATS = 3
_LONG_S = 1.0


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch on `count` threads while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_thread_count(work: Callable[[], object], most: int) -> int:
    """Of 1, 2, 4, ... and `most` threads the one with which `work` is fastest: the best of three tries each.

    NOTE: on small models, and on machines that do other things, more threads are often slower, by up to twenty times.
    """
    counts = sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i < most)})
    seconds = {count: _best_time(work, count) for count in counts}
    return min(counts, key=seconds.__getitem__)


def _best_time(work: Callable[[], object], count: int) -> float:
    best, spent = float("inf"), 0.0
    with torch_threads(count):
        work()  # the first call on other threads starts them
        for _ in range(_REPEATS):
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
            best, spent = min(best, seconds), spent + seconds
            if spent > _LONG_S:
                break
    return best
