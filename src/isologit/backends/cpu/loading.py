"""Packed weights from where they can be had fastest: the cache of earlier starts, or the checkpoint itself."""

from __future__ import annotations

import logging

from isologit.backends.cpu.packing import PackedWeights, allocate, layout_name, pack, packed_bytes, view
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.checkpoints.weight_cache import DamagedError, Kept, NotKeptError, WeightCache
from isologit.common.load_progress import OnLoadProgress

LEAST_CACHED_BYTES = 1 << 30  # smaller models are packed in seconds and leave nothing behind
_logger = logging.getLogger("isologit")


def load_weights(
    checkpoint: Checkpoint, *, num_threads: int, use_cache: bool, on_progress: OnLoadProgress | None = None
) -> PackedWeights:
    """The checkpoint's weights, packed; its hash is known afterwards.

    Large ones are kept in the cache if `use_cache`, and read from it at the next start: then the hash is the one that
    was found when the weights were packed. Random weights are kept like any others: making them takes more of a
    processor than reading them back.
    Memory in use is `packed_bytes(config)` and less than 1 GiB beside them. Raises ModelError for a file that cannot be
    read; a cache that is damaged or cannot be written is a warning.
    """
    config = checkpoint.config
    if not use_cache or packed_bytes(config) < LEAST_CACHED_BYTES:
        return pack(checkpoint, num_threads=num_threads, on_progress=on_progress)
    cache, layout, fingerprint = WeightCache(), layout_name(config), checkpoint.fingerprint()
    kept = cache.find(fingerprint, layout)
    if kept is not None:
        found = _read(checkpoint, cache, kept, num_threads, on_progress)
        if found is not None:
            return found
    weights = pack(checkpoint, num_threads=num_threads, on_progress=on_progress)
    try:
        cache.keep(
            weights.memory,
            title=checkpoint.title,
            fingerprint=fingerprint,
            sha256=checkpoint.sha256(),
            layout=layout,
            facts={"byte_head": weights.byte_head is not None},
            num_threads=num_threads,
            on_progress=on_progress,
        )
    except NotKeptError as error:
        _logger.warning("packed weights are not kept for the next start: %s", error)
    return weights


def _read(
    checkpoint: Checkpoint, cache: WeightCache, kept: Kept, num_threads: int, on_progress: OnLoadProgress | None
) -> PackedWeights | None:
    """What is kept, or None when it is not what was written."""
    memory = allocate(checkpoint.config)
    try:
        cache.read(kept, memory, num_threads=num_threads, on_progress=on_progress)
    except DamagedError as error:
        _logger.warning("%s; the weights are packed again", error)
        kept.path.unlink(missing_ok=True)
        return None
    checkpoint.adopt_sha256(kept.sha256)
    return view(checkpoint.config, memory, byte_head=kept.facts["byte_head"])
