"""A fixed kernel on every core, so that a machine that changes is seen, and its rate, for the physics of a run."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_SIZE, _TURNS, _SECONDS = 256, 12, 0.4
_SMALL, _PEAK_S = 64, 0.1


def canary_seconds() -> float:
    """Seconds of the kernel: the least of several turns within 0.4 s, all cores at once."""
    cores = len(os.sched_getaffinity(0))
    arrays = [np.random.default_rng(i).standard_normal((2, _SIZE, _SIZE)).astype(np.float32) for i in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        times: list[float] = []
        begun = time.perf_counter()
        while not times or time.perf_counter() - begun < _SECONDS:
            start = time.perf_counter()
            list(pool.map(_work, arrays))
            times.append(time.perf_counter() - start)
    return min(times)


def peak_flop_per_s() -> float:
    """Floating-point operations a second of one core in numpy's matrix product, float32: the best of 0.1 s.

    One product is small enough for one thread, and for the microseconds that a busy machine leaves undisturbed: a rate
    that others make too low would make the least time that an honest entry must have used too high.
    """
    a, b = np.random.default_rng(0).standard_normal((2, _SMALL, _SMALL)).astype(np.float32)
    best_s, begun = float("inf"), time.perf_counter()
    while best_s == float("inf") or time.perf_counter() - begun < _PEAK_S:
        start = time.perf_counter()
        a @ b
        best_s = min(best_s, time.perf_counter() - start)
    return 2.0 * _SMALL**3 / best_s


def _work(pair: np.ndarray) -> None:
    a, b = pair
    for _ in range(_TURNS):
        a @ b
