"""One pass over all weights: every byte is read once, by all cores, hashed and handed on in small blocks.

Knows neither files nor what becomes of the blocks.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from isologit.checkpoints.hashing import row_blocks, values_digest
from isologit.checkpoints.stored import WEIGHT_DTYPES, StoredTensor
from isologit.common.load_progress import LoadProgress, OnLoadProgress
from isologit.common.workers import share

# `visit(name, first_row, block)`: a block of the tensor's rows in its stored dtype, [rows, ...], from `first_row` on.
Visit = Callable[[str, int, torch.Tensor], None]

_MOST_THREADS = 16  # each holds a block or two of some 4 MiB; more of them would not read faster


def read_weights(
    tensors: Mapping[str, StoredTensor],
    visit: Visit | None = None,
    *,
    num_threads: int | None = None,
    on_progress: OnLoadProgress | None = None,
    doing: str = "reading weights",
) -> dict[str, str]:
    """Read each tensor once; returns the digest of each one's values (`hashing`).

    `visit` gets every block once, from several threads, in any order; the block's memory is used again afterwards.
    Memory in use is some blocks of 4 MiB for each thread. Raises ModelError for a file that cannot be read.
    """
    digests: dict[str, list[bytes]] = {name: [b""] * len(row_blocks(tensor)) for name, tensor in tensors.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    own, lock, done = threading.local(), threading.Lock(), 0

    def jobs() -> Iterator[tuple[str, StoredTensor, int, int, int]]:
        for name, tensor in tensors.items():
            for number, (first, last) in enumerate(row_blocks(tensor)):
                yield name, tensor, number, first, last

    def work(job: tuple[str, StoredTensor, int, int, int]) -> None:
        nonlocal done
        name, tensor, number, first, last = job
        size = (last - first) * tensor.row_bytes
        if getattr(own, "buffer", None) is None or len(own.buffer) < size:
            own.buffer = np.empty(size, np.uint8)
        block = own.buffer[:size]
        if visit is not None or tensor.digest is None:
            tensor.read(first, block.reshape(last - first, tensor.row_bytes))
        if tensor.digest is None:
            digests[name][number] = hashlib.sha256(block).digest()
        if visit is not None:
            shaped = torch.from_numpy(block).view(WEIGHT_DTYPES[tensor.dtype])
            visit(name, first, shaped.view(last - first, *tensor.shape[1:]))
        with lock:
            done += size

    def tick() -> None:
        if on_progress is not None:
            on_progress(LoadProgress(doing, done, total))

    threads = min(num_threads or len(os.sched_getaffinity(0)), _MOST_THREADS)
    share(jobs(), work, num_threads=threads, tick=tick)
    return {name: tensor.digest or values_digest(digests[name]) for name, tensor in tensors.items()}
