"""What this backend's products could reach at most on this machine, measured."""

from __future__ import annotations

import time

import numpy as np

from isologit.backends.cpu.crew import Crew
from isologit.backends.cpu.kernels import COUNTER_STRIDE, multiply_tiles
from isologit.backends.cpu.memory import zeros
from isologit.backends.cpu.simd import PANEL_WIDTH, TILE_ROWS

_DEPTH, _TILES, _PANELS = 512, 8, 4  # of the measured product: half a megabyte, which the second-level cache holds
_TILE_REPEATS = 400  # ten milliseconds and more: a thread that slept may take half of one to wake


def product_rate(num_threads: int, repeats: int = 7) -> float:
    """Median FLOP/s of the full register tile on `num_threads` threads, with all it reads in the near caches."""
    rows, columns = zeros((_TILES, _DEPTH, TILE_ROWS)), zeros((_PANELS, _DEPTH, PANEL_WIDTH))
    rows.fill(0.5)
    columns.fill(0.25)
    start, out = zeros(PANEL_WIDTH), zeros((num_threads, TILE_ROWS * PANEL_WIDTH))
    crew = Crew(num_threads)

    def seconds() -> float:
        began = time.perf_counter()
        crew.run(multiply_tiles, np.zeros(COUNTER_STRIDE, np.int64), rows, columns, start, out, _TILE_REPEATS)
        return time.perf_counter() - began

    seconds()  # compiles
    flop = 2 * rows.size * _PANELS * PANEL_WIDTH * _TILE_REPEATS * num_threads
    rate = flop / float(np.median([seconds() for _ in range(repeats)]))
    crew.close()
    return rate
