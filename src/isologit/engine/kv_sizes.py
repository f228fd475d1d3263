"""How many blocks of keys and values there are. Knows numbers of blocks and bytes only."""

from __future__ import annotations

from collections.abc import Sequence

_PREFIX_CACHE_BLOCKS = 64  # beyond what running requests can need, so that finished prefixes stay a while
_PREPARED_TOKENS, _PREPARED_BYTES = 32768, 2 << 30  # ready before any request is known
_SHARE = 0.5  # of the memory that is free once the model is loaded


def most_blocks(free_bytes: int, block_bytes: int, given_bytes: int | None = None) -> int:
    """Blocks that all running requests may have together: as many as were given, or half of the free memory."""
    return (given_bytes or int(free_bytes * _SHARE)) // block_bytes


def prepared_blocks(most: int, block_bytes: int, block_size: int, given_bytes: int | None = None) -> int:
    """Blocks that are ready before any request is known: all that were given, or 32768 tokens and 2 GiB at most."""
    if given_bytes is not None:
        return most
    return min(most, _PREPARED_BYTES // block_bytes, _PREPARED_TOKENS // block_size)


def run_blocks(needs: Sequence[int], slots: int, most: int) -> int:
    """Blocks for a run: the largest `slots` needs can run at once, and some finished prefixes stay."""
    return min(most, sum(sorted(needs, reverse=True)[:slots]) + _PREFIX_CACHE_BLOCKS)
