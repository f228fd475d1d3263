"""Tile sizes of the product kernels by the rows of a step: data, measured once, so that nothing is tuned at start.

BLOCK_K and the splits of the sum fix the order in which a logit is summed; they are the same for every step, so the
rest may follow the number of rows. (Seen on an H200: all tiles here give the same bits.)
"""

from __future__ import annotations

from typing import NamedTuple

BLOCK_K = 64
K_SPLITS = 2  # of products with few output features, so that there are programs enough for all multiprocessors
NARROW_ROWS = 64  # steps of so many rows at most wait for weights, and take `linear_narrow`
BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)


class Tile(NamedTuple):
    """One program's part of a product, its warps, and the depth of its loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Time of one program, relative: measured on an H200 (132 multiprocessors) at sizes that fill it evenly.
_WIDE = {Tile(64, 128, 4, 5): 0.95, Tile(128, 128, 4, 4): 1.54, Tile(128, 256, 8, 3): 2.78}


def bucket_of(rows: int) -> int:
    """Rows that a step of `rows` rows is padded to: few enough that each can have its own CUDA graph."""
    for bucket in BUCKETS:
        if rows <= bucket:
            return bucket
    return -(-rows // BUCKETS[-1]) * BUCKETS[-1]


def tile_for(rows: int, out_features: int, k_splits: int, num_multiprocessors: int) -> Tile:
    """The tile for a product of so many rows, a bucket, and output features, a multiple of 128.

    Above `NARROW_ROWS` the one whose programs take the least time in rounds over all multiprocessors.
    """
    if rows <= NARROW_ROWS:
        return Tile(rows, 64, 4, 6) if rows < 64 else Tile(64, 128, 4, 5)

    def seconds(tile: Tile) -> float:
        programs = rows // tile.block_m * (out_features // tile.block_n) * k_splits
        return -(-programs // num_multiprocessors) * _WIDE[tile]

    return min((t for t in _WIDE if rows % t.block_m == 0 and out_features % t.block_n == 0), key=seconds)
