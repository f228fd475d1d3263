"""The largest logit of a row without computing most of its logits, and with proof that none of those is larger.

Every column of the LM head also exists as bytes. An integer product with them, two or four times as fast as one of
float32, gives each logit up to an error that the Cauchy-Schwarz inequality bounds: with h and w approximated by h' and
w', |h.w - h'.w'| <= |h||w - w'| + |h - h'||w'|. Panels of columns whose upper bound reaches the largest exact logit
found are computed exactly, by the same chain of multiply-adds as in the whole product; the others cannot hold the
maximum. The norms include what rounding adds, of the exact product too (Higham 2002, section 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from isologit.backends.cpu.kernels import dot_short, even_share, panel_count, panel_portion, tile_count
from isologit.backends.cpu.memory import aligned
from isologit.backends.cpu.simd import BYTE_PRODUCTS, PANEL_WIDTH, WORDS_OF_FOUR, atomic_add
from isologit.backends.cpu.tiles import bound_tile
from isologit.common.compiler import njit

NOT_PICKED = -2  # a row whose logits must all be computed
_LARGEST_BYTE = 127
_LARGEST_SUM = 2**31 - 1  # of products that an int32 holds
LARGEST_DEPTH = _LARGEST_SUM // (255 * _LARGEST_BYTE)
_PAIRS = BYTE_PRODUCTS == "pairs"
ROW_DTYPE = np.int16 if _PAIRS else np.int8  # of a row's integers, which the bytes are multiplied with
_MOST_PANELS = 256  # of a row
_LEAST_NORM, _MOST_NORM = 1e-12, 1e12  # of a row; beyond them the factors could leave float32
_ROWS_AT_ONCE = 2048  # vocabulary entries approximated together, to bound the memory it takes


@dataclass(frozen=True)
class ByteHead:
    """The LM head's weights as bytes.

    weights: int32 [panels, in_features / 4, PANEL_WIDTH], four uint8 each: a weight divided by its column's scale,
    plus 128. columns: float32 [panels, 3, PANEL_WIDTH]: the scale, a bound on |w - w'| with rounding, and on |w'|.
    """

    weights: np.ndarray
    columns: np.ndarray

    @property
    def nbytes(self) -> int:
        """Memory of both."""
        return self.weights.nbytes + self.columns.nbytes


def has_byte_bounds(depth: int) -> bool:
    """Whether products of so many features can be bounded: neither odd nor huge depths can."""
    return depth % 4 == 0 and depth <= LARGEST_DEPTH


def quantised_rows(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows [n, in_features] of an LM head as bytes, uint8 [n, in_features], and what bounds them, float32 [n, 3].

    Both as in `ByteHead`. None when a weight is not finite or near the end of float32: no bounds.
    """
    exact = rows.double().numpy()
    largest = np.abs(exact).max(1)
    if not largest.max(initial=0) < _MOST_NORM:  # NOTE: written so that NaN is refused as well.
        return None
    rounding = (exact.shape[1] + 32) * 2.0**-23
    scale = np.where(largest > 0, largest / _LARGEST_BYTE, 1.0).astype(np.float32)
    scaled = np.rint(exact / scale.astype(np.float64)[:, None]).clip(-_LARGEST_BYTE, _LARGEST_BYTE)
    approximate = scaled * scale.astype(np.float64)[:, None]
    error = np.linalg.norm(exact - approximate, axis=1) + rounding * np.linalg.norm(exact, axis=1)
    columns = np.stack([scale, _rounded_up(error), _rounded_up(np.linalg.norm(approximate, axis=1))], axis=1)
    return (scaled + 128).astype(np.uint8), columns


def pack_byte_head(head: torch.Tensor) -> ByteHead | None:
    """[vocab, in_features] -> bytes; None without bounds: odd or huge depths, weights near the end of float32."""
    vocab, depth = head.shape
    if not has_byte_bounds(depth):
        return None
    panels = panel_count(vocab)
    bytes_ = np.full((panels * PANEL_WIDTH, depth), 128, np.uint8)
    # NOTE: columns of padding have a bound below any logit.
    columns = np.zeros((panels * PANEL_WIDTH, 3), np.float32)
    columns[vocab:, 1] = -np.inf
    for first in range(0, vocab, _ROWS_AT_ONCE):
        found = quantised_rows(head[first : first + _ROWS_AT_ONCE])
        if found is None:
            return None
        places = slice(first, first + len(found[0]))
        bytes_[places], columns[places] = found
    by_panel = bytes_.reshape(panels, PANEL_WIDTH, depth // 4, 4).transpose(0, 2, 1, 3)
    weights = np.ascontiguousarray(by_panel).view(np.int32)[..., 0]
    return ByteHead(aligned(weights), aligned(columns.reshape(panels, PANEL_WIDTH, 3).transpose(0, 2, 1)))


def _rounded_up(x: np.ndarray) -> np.ndarray:
    return np.nextafter(x.astype(np.float32), np.float32(np.inf))


@njit(nogil=True)
def largest_integer(depth):
    """Largest of a row's integers: a byte, or in 16 bits what no int32 sum of `depth` products overflows with."""
    return min(32767, _LARGEST_SUM // (255 * depth)) if _PAIRS else _LARGEST_BYTE


@njit(nogil=True, fastmath={"reassoc", "contract"})
def quantise_row(x, offset, size, out, out_offset, height, rows_to_take, factors, row):
    """Row `row` of a step as integers: `size` float32 from `x[offset]` on; False if zero or not finite: no bounds.

    out: ROW_DTYPE, tiles of [size / 4, height, 4], the row's first integer at `out_offset`; in pairs, of four the first
    and the third come first. rows_to_take[row] and factors[row]: what `bound_tile` wants of the row.
    """
    most = largest_integer(size)
    largest = np.float32(0.0)
    for i in range(size):
        largest = max(largest, abs(x[offset + i]))
    scale = largest / np.float32(most)
    inverse = np.float32(most) / largest if largest > 0 else np.float32(0.0)
    total = 0
    length = error = 0.0
    for i in range(size):
        value = x[offset + i]
        integer = min(most, max(-most, math.floor(value * inverse + np.float32(0.5))))
        within = (i & 1) << 1 | (i & 2) >> 1 if _PAIRS else i & 3
        out[out_offset + (i >> 2) * 4 * height + within] = integer
        total += integer
        wide = np.float64(value)
        left = wide - np.float64(scale) * integer
        length += wide * wide
        error += left * left
    length, error = math.sqrt(length) * _UP, math.sqrt(error) * _UP
    rows_to_take[row] = 128 * total
    factors[row, 0] = length / scale if scale > 0 else 0.0
    factors[row, 1] = error / scale if scale > 0 else 0.0
    factors[row, 2] = scale
    return _LEAST_NORM < length < _MOST_NORM


_UP = 1.0 + 1e-6  # more than rounding to float32 can take away


@njit(nogil=True)
def bound_panels(x, rows, weights, columns, rows_to_take, factors, tops, counters, counter):
    """One thread's share of the largest upper bound of each panel for each row: `tops` [panels, rows], flat.

    x: int32, the rows' integers in tiles. Threads share the panels through `counters[counter]`, as in `linear`.
    """
    num_panels, depth = weights.shape[0], weights.shape[1]
    flat, column_flat = weights.reshape(-1), columns.reshape(-1)
    panel_size = depth * PANEL_WIDTH
    tiles = tile_count(rows)
    pace = -(-16 // max(1, tiles))
    fetched_by_tile = depth * PANEL_WIDTH * pace // 16
    while True:
        first, last = panel_portion(atomic_add(counters, counter, 1), num_panels, 1)
        if first >= num_panels:
            break
        for panel in range(first, last):
            for tile in range(tiles):
                top, end = even_share(tile, tiles, rows)
                bound_tile(
                    x, top * depth * WORDS_OF_FOUR, (end - top) * WORDS_OF_FOUR, flat, panel * panel_size, depth,
                    panel_size + tile * fetched_by_tile, pace, column_flat, panel * 3 * PANEL_WIDTH,
                    rows_to_take, factors, top, tops, panel * rows + top, end - top,
                )  # fmt: skip


@njit(nogil=True)
def pick_row(x, x_offset, row, rows, panels, vocab, tops, row_tops, scratch, zeros, offsets):
    """Index of the row's largest logit, the lowest on ties, and the number of panels computed for it.

    The index is NOT_PICKED if too many panels might hold it.

    The row's `in_features` float32 begin at `x[x_offset]`; it is number `row` of the `rows` for which `bound_panels`
    gave `tops`. panels: of the whole product. Of this thread are row_tops, a float32 for each panel; scratch, 4 *
    PANEL_WIDTH float32, and that many zeros from `zeros` on; offsets, 8 int64.
    """
    num_panels, depth = panels.shape[0], panels.shape[1]
    flat = panels.reshape(-1)
    panel_size = depth * PANEL_WIDTH
    likeliest = 0
    for panel in range(num_panels):
        row_tops[panel] = tops[panel * rows + row]
        if row_tops[panel] > row_tops[likeliest]:
            likeliest = panel
    best, chosen = np.float32(-np.inf), -1
    offsets[0], offsets[1] = likeliest * panel_size, 0
    panel, count, taken = 0, 1, 1
    while taken > 0:
        dot_short(x, x_offset, 1, flat, offsets, PANEL_WIDTH, depth, scratch, zeros, 0, scratch, 0, 0, 1, taken)
        for i in range(taken):
            column = offsets[2 * i] // depth
            for j in range(min(PANEL_WIDTH, vocab - column)):
                value = scratch[i * PANEL_WIDTH + j]
                if value > best or (value == best and column + j < chosen):
                    best, chosen = value, column + j
        taken = 0
        while panel < num_panels and taken < 4:
            if panel != likeliest and row_tops[panel] >= best:
                offsets[2 * taken], offsets[2 * taken + 1] = panel * panel_size, 0
                taken += 1
            panel += 1
        count += taken
        if count > _MOST_PANELS:
            return NOT_PICKED, count
    return chosen, count
