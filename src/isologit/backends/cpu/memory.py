"""Arrays for the kernels: they begin at a cache line, so that no vector lies in two of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from isologit.backends.cpu.simd import CACHE_LINE


def zeros(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """As `numpy.zeros`, beginning at a cache line."""
    size = math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    first = -raw.ctypes.data % CACHE_LINE
    array: np.ndarray = raw[first : first + size].view(dtype).reshape(shape)
    return array


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a cache line."""
    copy = zeros(array.shape, array.dtype)
    copy[...] = array
    return copy
