"""Which logits rows are compared in full: a secret, seeded draw over all requests.

Owns the draw and what its indices mean. It does not know how the engine keeps a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

LAST = -1
"""In a capture plan: the row of whichever output token turns out to be the last (an early end is not known before)."""


def draw_capture_plan(lengths: Mapping[str, int], *, seed: int, rows: int) -> dict[str, frozenset[int]]:
    """Draw about `rows` output tokens, stratified: a quarter first ones, a quarter last ones, the rest between.

    lengths: maximum number of output tokens by request id; a request without any is never drawn. Returned indices are
    0-based output tokens, or `LAST`. First and last tokens are drawn evenly over requests, the ones between evenly
    over tokens, so that long requests are drawn more often. A token between may never be produced when a request ends
    early; then its row does not exist and nothing is missing. The draw depends on ids, lengths and seed, not on the
    order of the mapping. Where one stratum is too small the others give more.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; a plan of no rows checks nothing")
    ids = sorted(request_id for request_id, length in lengths.items() if length > 0)
    with_last = [request_id for request_id in ids if lengths[request_id] > 1]
    between = np.array([max(0, lengths[request_id] - 2) for request_id in ids], np.int64)
    ends = np.cumsum(between)
    num_between = int(ends[-1]) if ids else 0

    first = min(len(ids), -(-rows // 4))
    last = min(len(with_last), rows // 4)
    middle = min(num_between, rows - first - last)
    first = min(len(ids), rows - last - middle)
    last = min(len(with_last), rows - first - middle)

    rng = np.random.default_rng(seed)
    plan: dict[str, set[int]] = {}
    for i in rng.choice(len(ids), first, replace=False) if first else ():
        plan.setdefault(ids[i], set()).add(0)
    for i in rng.choice(len(with_last), last, replace=False) if last else ():
        plan.setdefault(with_last[i], set()).add(LAST)
    for flat in rng.choice(num_between, middle, replace=False) if middle else ():
        i = int(np.searchsorted(ends, flat, side="right"))
        plan.setdefault(ids[i], set()).add(1 + int(flat - (ends[i] - between[i])))
    return {request_id: frozenset(plan[request_id]) for request_id in sorted(plan)}


def resolve_capture(indices: Collection[int], num_output_tokens: int) -> frozenset[int]:
    """The rows that a request with this many output tokens must have: `LAST` named, tokens never produced left out."""
    named = {num_output_tokens - 1 if index == LAST else index for index in indices}
    return frozenset(index for index in named if 0 <= index < num_output_tokens)
