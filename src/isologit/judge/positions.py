"""Which rows an entry must reveal: drawn after its streams ended, from the round's seed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def draw_positions(lengths: Mapping[str, int], seed: bytes, rows: int) -> list[tuple[str, int]]:
    """`rows` different (request id, output index), evenly over all output tokens, sorted; all where there are fewer.

    lengths: output tokens by request id. The draw depends on ids, lengths and seed, not on the mapping's order.
    """
    ids = sorted(name for name, length in lengths.items() if length > 0)
    ends = np.cumsum([lengths[name] for name in ids])
    total = int(ends[-1]) if ids else 0
    generator = np.random.default_rng(int.from_bytes(seed, "little"))
    flat = np.sort(generator.choice(total, min(rows, total), replace=False)) if total else np.empty(0, np.int64)
    found = []
    for place in flat.tolist():
        owner = int(np.searchsorted(ends, place, side="right"))
        found.append((ids[owner], int(place - (ends[owner] - lengths[ids[owner]]))))
    return found
