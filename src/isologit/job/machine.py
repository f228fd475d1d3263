"""What this machine was measured to do: float32 products, and reading memory. The floor under any run's time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from isologit.backends.cpu.crew import Crew
from isologit.backends.cpu.kernels import COUNTER_STRIDE, multiply_tiles
from isologit.backends.cpu.memory import zeros
from isologit.backends.cpu.simd import PANEL_WIDTH, TILE_ROWS

_DEPTH, _TILES, _PANELS = 512, 8, 4  # of the tile loop's product: half a megabyte, which the second-level cache holds
_TILE_REPEATS = 20


@dataclass(frozen=True)
class MachineLimits:
    """FLOP/s of a float32 product of the library, and of this engine's tile loop; bytes/s of reading memory.

    On some CPUs the library's product runs at half the rate of the tile loop, which is what no product here exceeds.
    """

    flops: float
    tile_flops: float
    bytes_per_s: float


def measure_limits() -> MachineLimits:
    """Measure the rates, on as many threads as torch has (about two seconds, and some more to compile once)."""
    return MachineLimits(product_rate(), tile_rate(torch.get_num_threads()), streaming_rate())


def product_rate(size: int = 2048, repeats: int = 7) -> float:
    """Median FLOP/s of a square float32 product of torch."""
    x, y = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(x, y), repeats)


def tile_rate(num_threads: int, repeats: int = 7) -> float:
    """Median FLOP/s of the full register tile of this engine's products, with all it reads in the near caches."""
    rows, columns = zeros((_TILES, _DEPTH, TILE_ROWS)), zeros((_PANELS, _DEPTH, PANEL_WIDTH))
    rows.fill(0.5)
    columns.fill(0.25)
    start, out = zeros(PANEL_WIDTH), zeros((num_threads, TILE_ROWS * PANEL_WIDTH))
    crew = Crew(num_threads)

    def work() -> None:
        crew.run(multiply_tiles, np.zeros(COUNTER_STRIDE, np.int64), rows, columns, start, out, _TILE_REPEATS)

    work()
    flop = 2 * rows.size * _PANELS * PANEL_WIDTH * _TILE_REPEATS * num_threads
    seconds = _median_seconds(work, repeats)
    crew.close()
    return flop / seconds


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
