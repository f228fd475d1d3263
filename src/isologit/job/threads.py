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
    """Of 1, 2, 4, ... and `most` threads the one with which `work` is fastest.

    Each is tried three times and the best counts; once, if that takes long.

    NOTE: on small models, and on machines that do other things, more threads are often slower, by up to twenty times.
    """
    counts = sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i < most)})
    seconds = {count: _best_time(work, count) for count in counts}
    return min(counts, key=seconds.__getitem__)


def _best_time(work: Callable[[], object], count: int) -> float:
    spent: list[float] = []
    with torch_threads(count):
        while len(spent) <= _REPEATS and sum(spent) <= _LONG_S:
            start = time.perf_counter()
            work()
            spent.append(time.perf_counter() - start)
    return min(spent[1:] or spent)  # the first call on other threads starts them, which shows in short work only
