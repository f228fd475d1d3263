"""What the hash of a model is, so that many threads can make it while they read.

    model  = SHA-256 of a line "NAME DTYPE [SHAPE] VALUES\\n" for every tensor, in the order of the names
    VALUES = SHA-256 of the SHA-256 of each block of the tensor, one after another, in hexadecimal
    block  = as many whole rows as fit 4 MiB, but a multiple of 64, and 64 at least; the last one has what is left

Values are little-endian and row-major; the rows of a vector are its elements. Which rows a block has follows from shape
and type alone, so the hash does not depend on files, machines or threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from isologit.checkpoints.stored import StoredTensor

_BLOCK_BYTES = 4 << 20
_BLOCK_ROWS = 64  # a multiple of every packed layout's panel, so that threads that pack blocks share no panel


def row_blocks(tensor: StoredTensor) -> list[tuple[int, int]]:
    """First row, and the row after the last one, of each block."""
    step = max(1, _BLOCK_BYTES // tensor.row_bytes // _BLOCK_ROWS) * _BLOCK_ROWS
    return [(first, min(first + step, tensor.num_rows)) for first in range(0, tensor.num_rows, step)]


def values_digest(block_digests: Sequence[bytes]) -> str:
    """Of a tensor, from the SHA-256 of each of its blocks."""
    return hashlib.sha256(b"".join(block_digests)).hexdigest()


def model_digest(tensors: Mapping[str, StoredTensor], digests: Mapping[str, str]) -> str:
    """Of a model, from the `values_digest` of each of its tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)} {digests[name]}\n".encode())
    return digest.hexdigest()
