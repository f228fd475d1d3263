"""Which block of key/value memory is free, in use, or worth keeping. Ids and reference counts only, never tensors.

A full block's content is fixed by its tokens and everything before them. The prefix cache is therefore a tree: a node
is (number of the parent node, tokens of the block), looked up in a dictionary that compares the tokens themselves, so
two prefixes whose hashes collide are never mistaken for each other. Node numbers are never used twice, so a block id
that has been given new content cannot be taken for its former parent.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC

from isologit.errors import ConfigError, IsologitError

_ROOT = 0  # the node before the first block
_NO_NODE = -1  # content unknown to the cache

_Key = tuple[int, tuple[int, ...]]


class OutOfBlocksError(IsologitError):
    """More blocks were asked for than are free."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, ids from 0. Raises ConfigError for sizes below 1."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"num_blocks ({num_blocks}) and block_size ({block_size}) must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack of blocks with nothing to keep
        self._free_cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_nodes = _ROOT
        self._nodes = [_NO_NODE] * num_blocks  # node of each block's content
        self._cached: dict[_Key, int] = {}  # the one block that answers for a node
        self._keys: dict[int, _Key] = {}  # inverse of `_cached`

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, those kept only for the prefix cache included."""
        return len(self._free) + len(self._free_cached)

    def match_prefix(self, token_ids: SequenceABC[int]) -> list[int]:
        """Blocks that already hold the longest cached prefix; not acquired.

        Full blocks only, and never the one with the last token: at least one token must be computed to get logits.
        """
        matched: list[int] = []
        if not self._cached:
            return matched
        node, size = _ROOT, self.block_size
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            block_id = self._cached.get((node, tuple(token_ids[start : start + size])))
            if block_id is None:
                break
            matched.append(block_id)
            node = self._nodes[block_id]
        return matched

    def can_allocate(self, count: int, shared: SequenceABC[int]) -> bool:
        """Whether `count` blocks would be free once the matched blocks `shared` are acquired."""
        return count <= self.num_free - sum(self._ref_counts[block_id] == 0 for block_id in shared)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, forgetting the least recently used cached ones if need be.

        Raises OutOfBlocksError, and takes nothing, if fewer are free.
        """
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} free")
        taken: list[int] = []
        for _ in range(count):
            if self._free:
                block_id = self._free.pop()
            else:
                block_id, _ = self._free_cached.popitem(last=False)
                del self._cached[self._keys.pop(block_id)]
            self._nodes[block_id] = _NO_NODE
            self._ref_counts[block_id] = 1
            taken.append(block_id)
        return taken

    def acquire(self, block_ids: Iterable[int]) -> None:
        """One more owner for each of these matched blocks. Raises AssertionError for a block that holds nothing."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                if block_id not in self._free_cached:
                    raise AssertionError(f"block {block_id} is free and not cached; it cannot be shared")
                del self._free_cached[block_id]
            self._ref_counts[block_id] += 1

    def register(self, block_id: int, parent: int | None, tokens: SequenceABC[int]) -> None:
        """Every token of this block is computed: let later prompts find it.

        `parent` is the block before it in the sequence, None for the first. If another block answers for the same
        content already, this one stays private. Raises AssertionError for a block that is not full or not in use.
        """
        if not self.enable_prefix_caching:
            return
        if self._ref_counts[block_id] == 0 or len(tokens) != self.block_size:
            raise AssertionError(f"block {block_id} with {len(tokens)} tokens is not a full block in use")
        if self._nodes[block_id] != _NO_NODE:
            raise AssertionError(f"block {block_id} is registered already")
        parent_node = _ROOT if parent is None else self._nodes[parent]
        if parent_node == _NO_NODE:
            raise AssertionError(f"block {parent} must be registered before block {block_id} that follows it")
        key = (parent_node, tuple(tokens))
        known = self._cached.get(key)
        if known is None:
            self._num_nodes += 1
            self._nodes[block_id] = self._num_nodes
            self._cached[key] = block_id
            self._keys[block_id] = key
        else:
            self._nodes[block_id] = self._nodes[known]

    def release(self, block_ids: SequenceABC[int]) -> None:
        """One owner less for each block of a sequence, given in the sequence's order.

        The last is freed first, so that of a cached prefix the end is forgotten before the beginning. Raises
        AssertionError for a block that has no owner.
        """
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id]
            if count == 0:
                raise AssertionError(f"block {block_id} is released but has no owner")
            self._ref_counts[block_id] = count - 1
            if count == 1:
                if block_id in self._keys:
                    self._free_cached[block_id] = None
                else:
                    self._free.append(block_id)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Let no later prompt find these blocks in use, as what they hold cannot be trusted."""
        for block_id in block_ids:
            key = self._keys.pop(block_id, None)
            if key is not None:
                del self._cached[key]

    def check_integrity(self, owners: Iterable[SequenceABC[int]] | None = None) -> None:
        """Raise AssertionError, saying what is wrong, unless every block is accounted for exactly once.

        With `owners` (the block lists of all sequences that hold any) the reference counts must match them too.
        """
        free = self._free + list(self._free_cached)
        _hold(len(set(free)) == len(free), f"a block is on the free lists twice: {sorted(free)}")
        used = [block_id for block_id, count in enumerate(self._ref_counts) if count > 0]
        _hold(min(self._ref_counts) >= 0, f"negative reference count: {self._ref_counts}")
        _hold(not set(free) & set(used), f"free and in use at once: {sorted(set(free) & set(used))}")
        _hold(
            len(free) + len(used) == self.num_blocks, f"{len(free)} free + {len(used)} used != {self.num_blocks} blocks"
        )
        _hold(
            self._keys == {block_id: key for key, block_id in self._cached.items()},
            "the cache and its inverse disagree",
        )
        _hold(all(block_id in self._keys for block_id in self._free_cached), "a block is kept but cannot be found")
        _hold(not any(block_id in self._keys for block_id in self._free), "a cached block is on the plain free list")
        numbers = [self._nodes[block_id] for block_id in self._keys]
        _hold(len(set(numbers)) == len(numbers) and _NO_NODE not in numbers, "a cached block has no node of its own")
        if owners is not None:
            counts: Counter[int] = Counter()
            for block_ids in owners:
                _hold(len(set(block_ids)) == len(block_ids), f"a sequence holds a block twice: {list(block_ids)}")
                counts.update(block_ids)
            wrong = [i for i, count in enumerate(self._ref_counts) if count != counts[i]]
            _hold(not wrong, f"reference counts and owners disagree for blocks {wrong}")


def _hold(condition: bool, detail: str) -> None:
    if not condition:
        raise AssertionError(detail)
