"""Block tables: a row is written when its sequence comes, and belongs to it until it leaves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isologit.engine.runner import BlockTables

_ACTIONS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9), st.booleans()), max_size=60)


@given(_ACTIONS)
def test_each_running_sequence_finds_its_own_blocks(actions: list[tuple[int, int, bool]]) -> None:
    tables = BlockTables()
    running: dict[str, list[int]] = {}
    for step, (number, count, leaves) in enumerate(actions):
        name = str(number)
        if leaves:
            running.pop(name, None)
            tables.forget(name)
        else:
            blocks = running.setdefault(name, list(range(100 * step, 100 * step + count)))
            tables.row_of(name, blocks)
        rows = {name: tables.row_of(name, blocks) for name, blocks in running.items()}
        assert len(set(rows.values())) == len(running) == len(tables)
        for name, blocks in running.items():
            assert tables.array[rows[name], : len(blocks)].tolist() == blocks


def test_the_array_stays_while_there_is_room() -> None:
    tables = BlockTables()
    tables.row_of("a", [3, 4, 5])
    array = tables.array
    for name in "bcdefgh":
        tables.row_of(name, [1, 2])
    tables.forget("c")
    tables.row_of("i", [6])
    assert tables.array is array
    assert len(array) == 8
