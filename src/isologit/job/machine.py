"""What this machine was measured to do: float32 products, and reading memory. The floor under any run's time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from isologit.backends.registry import AUTO, choose_backend


@dataclass(frozen=True)
class MachineLimits:
    """FLOP/s of a float32 product of the library, and of the backend's tile loop; bytes/s of reading memory.

    On some CPUs the library's product runs at half the rate of the tile loop, which is what no product here exceeds.
    A backend whose products are the library's has no tile loop: both rates are the same.
    """

    flops: float
    tile_flops: float
    bytes_per_s: float


def measure_limits(backend: str = AUTO) -> MachineLimits:
    """Measure the rates, on as many threads as torch has (about two seconds, and some more to compile once)."""
    flops = product_rate()
    own = choose_backend(backend).product_rate(torch.get_num_threads())
    return MachineLimits(flops, flops if own is None else own, streaming_rate())


def product_rate(size: int = 2048, repeats: int = 7) -> float:
    """Median FLOP/s of a square float32 product of torch."""
    x, y = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(x, y), repeats)


def streaming_rate(megabytes: int = 400, repeats: int = 7) -> float:
    """Median bytes/s of reading memory far larger than the caches, in a dot product of its halves.

    A matrix-vector product of the library reads at half that rate on some machines.
    """
    half = megabytes * 2**20 // 8
    first, second = torch.randn(half), torch.randn(half)
    return 8 * half / _median_seconds(lambda: torch.dot(first, second), repeats)


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
