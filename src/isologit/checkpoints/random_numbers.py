"""Numbers near a normal distribution that any thread can begin anywhere in, the same bits on every machine.

Number i is made of word i of SplitMix64 (Steele, Lea and Flood 2014), which needs no state but its place: the sum of
the word's four 16-bit parts, minus the mean, times a factor. That is the Irwin-Hall distribution of order 4: its
standard deviation is exact, its excess kurtosis -0.3, and nothing lies beyond 3.46 standard deviations. All but the
factor is done in integers, and rounding to float32, float16 and bfloat16 is to the nearest, ties to even; no library
function whose last bit differs between machines is called.
"""

from __future__ import annotations

import math

import numpy as np

from isologit.common.compiler import njit

VERSION = 1  # of the numbers: another one gives other weights for the same seed
_MIDDLE = 2 * 65535  # mean of the sum
SUM_STD = math.sqrt((2**32 - 1) / 3)  # standard deviation of the sum
_GROUP = 1 << 16  # numbers made at a time: in float32 they stay in the second-level cache until they are rounded


@njit(nogil=True, cache=True)
def fill_float32(key: np.uint64, first: np.uint64, factor: np.float32, mean: np.float32, out: np.ndarray) -> None:
    """out[i] = number `first` + i of stream `key`, times `factor`, plus `mean`; float32."""
    for i in range(np.uint64(len(out))):
        word = key + (first + i) * np.uint64(0x9E3779B97F4A7C15)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word = word ^ (word >> np.uint64(31))
        low = np.uint64(0xFFFF)
        total = (word & low) + (word >> np.uint64(16) & low) + (word >> np.uint64(32) & low) + (word >> np.uint64(48))
        out[i] = np.float32(np.int32(total) - np.int32(_MIDDLE)) * factor + mean


@njit(nogil=True, cache=True)
def round_to_float16(bits: np.ndarray, out: np.ndarray) -> None:
    """float32 as bits (uint32) to float16 as bits (uint16); for finite numbers below 65504."""
    for i in range(np.uint64(len(out))):
        sign, size = bits[i] >> np.uint32(16) & np.uint32(0x8000), np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        if size >= np.uint32(0x38800000):  # normal: 10 of the 23 bits stay, the exponent's bias falls by 112
            odd = size >> np.uint32(13) & np.uint32(1)
            out[i] = sign | (size + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> np.uint32(13)
        else:  # subnormal: beside 0.5 a float32 has just their steps, so that adding it rounds
            out[i] = sign | (
                np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
            )


@njit(nogil=True, cache=True)
def round_to_bfloat16(bits: np.ndarray, out: np.ndarray) -> None:
    """float32 as bits (uint32) to bfloat16 as bits (uint16); for finite numbers."""
    for i in range(np.uint64(len(out))):
        odd = bits[i] >> np.uint32(16) & np.uint32(1)
        out[i] = (bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)


_ROUND = {"float16": round_to_float16, "bfloat16": round_to_bfloat16}


def fill(key: int, first: int, std: float, mean: float, dtype: str, out: np.ndarray) -> None:
    """Fill `out`, uint8 holding items of `dtype`, with the numbers from `first` on of the stream `key`.

    std, mean: of the numbers. float32 is made first and rounded to `dtype`, so every dtype has the same numbers.
    """
    factor, shift = np.float32(std / SUM_STD), np.float32(mean)
    if dtype == "float32":
        fill_float32(np.uint64(key), np.uint64(first), factor, shift, out.view(np.float32))
        return
    wide, items = np.empty(_GROUP, np.float32), out.view(np.uint16)
    for start in range(0, len(items), len(wide)):
        part = items[start : start + len(wide)]
        fill_float32(np.uint64(key), np.uint64(first + start), factor, shift, wide[: len(part)])
        _ROUND[dtype](wide[: len(part)].view(np.uint32), part)
