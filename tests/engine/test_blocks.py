"""Block accounting: conservation, prefix lookup by content, eviction order, and misuse that must be caught."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from isologit.engine.blocks import BlockPool, OutOfBlocksError
from isologit.errors import ConfigError


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """What a sequence does that computes exactly `tokens`: match, allocate the rest, register full blocks."""
    size = pool.block_size
    blocks = pool.match_prefix(tokens)
    pool.acquire(blocks)
    matched = len(blocks)
    blocks = blocks + pool.allocate(-(-len(tokens) // size) - matched)
    for i in range(matched, len(tokens) // size):
        pool.register(blocks[i], blocks[i - 1] if i else None, tokens[i * size : (i + 1) * size])
    return blocks


def test_only_full_blocks_before_the_last_token_match() -> None:
    pool = BlockPool(8, 2)
    blocks = fill(pool, [1, 2, 3, 4, 5])
    assert pool.match_prefix([1, 2]) == []
    assert pool.match_prefix([1, 2, 3]) == blocks[:1]
    assert pool.match_prefix([1, 2, 3, 4]) == blocks[:1]
    assert pool.match_prefix([1, 2, 3, 4, 5, 6, 7]) == blocks[:2]
    assert pool.match_prefix([3, 4, 1]) == []


def test_colliding_hashes_are_not_confused() -> None:
    twin = 2**61 - 1  # Python hashes it to 0
    assert hash((0, (0, twin))) == hash((0, (twin, 0)))
    pool = BlockPool(8, 2)
    first, second = fill(pool, [0, twin, 1]), fill(pool, [twin, 0, 1])
    assert pool.match_prefix([0, twin, 1]) == first[:1]
    assert pool.match_prefix([twin, 0, 1]) == second[:1]
    assert pool.match_prefix([0, 0, 1]) == []


def test_cached_blocks_are_forgotten_oldest_first_and_from_the_end() -> None:
    pool = BlockPool(4, 1)
    old = fill(pool, [1, 2])
    pool.release(old)
    new = fill(pool, [3, 4])
    pool.release(new)
    assert pool.num_free == 4
    assert pool.allocate(1) == [old[1]]
    assert pool.match_prefix([1, 2, 9]) == old[:1]
    pool.acquire(old[:1])
    pool.release(old[:1])  # now the most recently used
    assert pool.allocate(2) == [new[1], new[0]]
    assert pool.match_prefix([1, 9]) == old[:1]
    pool.check_integrity()


def test_new_content_in_a_parents_block_does_not_inherit_its_children() -> None:
    pool = BlockPool(2, 1)
    parent, child = fill(pool, [1, 2])
    pool.release([parent])
    (reused,) = pool.allocate(1)
    assert reused == parent
    pool.register(reused, None, [7])
    assert pool.match_prefix([7, 2, 9]) == [reused]
    assert pool.match_prefix([1, 2, 9]) == []
    pool.check_integrity([[reused], [child]])


def test_two_sequences_that_computed_the_same_prefix_at_once() -> None:
    pool = BlockPool(8, 2)
    first, second = pool.allocate(2), pool.allocate(2)
    for blocks in (first, second):
        pool.register(blocks[0], None, [1, 2])
    pool.register(second[1], second[0], [3, 4])
    assert pool.match_prefix([1, 2, 3, 4, 5]) == [first[0], second[1]]
    pool.release(first)
    pool.release(second)
    pool.check_integrity([])
    assert pool.num_free == 8


def test_caching_off_matches_nothing() -> None:
    pool = BlockPool(8, 2, enable_prefix_caching=False)
    blocks = fill(pool, [1, 2, 3, 4])
    assert pool.match_prefix([1, 2, 3, 4]) == []
    pool.release(blocks)
    pool.check_integrity([])


def test_allocation_fails_as_a_whole() -> None:
    pool = BlockPool(3, 2)
    pool.allocate(2)
    with pytest.raises(OutOfBlocksError, match="2 blocks asked for, 1 of 3 free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_shared_blocks_that_are_free_do_not_count_twice() -> None:
    pool = BlockPool(3, 1)
    pool.release(fill(pool, [1, 2]))
    shared = pool.match_prefix([1, 2, 3])
    assert pool.num_free == 3
    assert pool.can_allocate(1, shared)
    assert not pool.can_allocate(2, shared)


def test_sizes_are_checked() -> None:
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError):
            BlockPool(*sizes)


def test_misuse_is_caught() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="full block"):
        pool.register(blocks[0], None, [1])
    with pytest.raises(AssertionError, match="must be registered before"):
        pool.register(blocks[1], blocks[0], [1, 2])
    pool.register(blocks[0], None, [1, 2])
    with pytest.raises(AssertionError, match="already"):
        pool.register(blocks[0], None, [1, 2])
    pool.release(blocks)
    with pytest.raises(AssertionError, match="no owner"):
        pool.release(blocks[:1])
    with pytest.raises(AssertionError, match="not cached"):
        pool.acquire(blocks[1:])
    with pytest.raises(AssertionError, match="in use"):
        pool.register(blocks[1], None, [1, 2])


@pytest.mark.parametrize(
    ("damage", "detail"),
    [
        (lambda pool: pool._free.append(pool._free[0]), "twice"),
        (lambda pool: pool._free.append(0), "free and in use"),
        (lambda pool: pool._free.pop(), "free \\+"),
        (lambda pool: pool._ref_counts.__setitem__(0, 2), "owners disagree"),
        (lambda pool: pool._cached.clear(), "inverse"),
        (lambda pool: (pool._cached.clear(), pool._keys.clear()), "cannot be found"),
        (lambda pool: pool._free.append(pool._free_cached.popitem()[0]), "plain free list"),
        (lambda pool: pool._nodes.__setitem__(1, pool._nodes[0]), "node of its own"),
    ],
)
def test_integrity_check_sees_damage(damage: object, detail: str) -> None:
    pool = BlockPool(6, 1)
    blocks = fill(pool, [1, 2, 3])
    pool.release(blocks[1:])
    pool.check_integrity([blocks[:1]])
    damage(pool)  # type: ignore[operator]
    with pytest.raises(AssertionError, match=detail):
        pool.check_integrity([blocks[:1]])


class PoolMachine(RuleBasedStateMachine):
    """Random owners; the content of every block is tracked beside the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7, 2)
        self.owners: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}  # block -> the prefix up to and with it

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def admit(self, tokens: list[int]) -> None:
        shared = self.pool.match_prefix(tokens)
        for i, block_id in enumerate(shared):
            assert self.content[block_id] == tuple(tokens[: 2 * i + 2])
        needed = (len(tokens) + 1) // 2 - len(shared)
        if not self.pool.can_allocate(needed, shared):
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(needed + len(shared) + self.pool.num_blocks)
            return
        blocks = fill(self.pool, tokens)
        assert not any(block_id in owner for owner in self.owners for block_id in blocks[len(shared) :])
        for i in range(len(shared), len(blocks)):
            self.content[blocks[i]] = tuple(tokens[: 2 * i + 2])
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.pool.release(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @invariant()
    def accounts_add_up(self) -> None:
        self.pool.check_integrity(self.owners)
        assert self.pool.num_free == self.pool.num_blocks - len({i for owner in self.owners for i in owner})


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
