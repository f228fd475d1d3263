"""One seed: its hash beforehand, everything drawn from it, nothing told by one draw about another."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isologit.judge.positions import draw_positions
from isologit.judge.seeds import RoundSeed


def test_the_published_hash_is_sha256_of_the_seed() -> None:
    seed = RoundSeed.draw()
    assert seed.published == hashlib.sha256(seed.secret).hexdigest()
    assert RoundSeed.from_hex(seed.secret.hex()) == seed


def test_draws_are_repeatable_and_apart() -> None:
    seed = RoundSeed(bytes(32))
    assert seed.derive("nonce", 1) == seed.derive("nonce", 1)
    assert len({seed.derive("nonce", i) for i in range(50)} | {seed.derive("order", 1)}) == 51
    assert seed.derive("a", "b") != seed.derive("ab")


@pytest.mark.parametrize("text", ["", "00", "zz" * 32])
def test_a_seed_has_32_bytes(text: str) -> None:
    with pytest.raises(ValueError, match=r"bytes|hexadecimal"):
        RoundSeed.from_hex(text)


@given(
    st.dictionaries(st.text(min_size=1, max_size=4), st.integers(0, 30), max_size=12),
    st.binary(min_size=32, max_size=32),
    st.integers(1, 80),
)
def test_positions_exist_and_come_once(lengths: dict[str, int], seed: bytes, rows: int) -> None:
    found = draw_positions(lengths, seed, rows)
    assert len(found) == len(set(found)) == min(rows, sum(lengths.values()))
    assert all(0 <= index < lengths[name] for name, index in found)
    assert found == draw_positions(dict(reversed(list(lengths.items()))), seed, rows)


def test_positions_are_even_over_tokens() -> None:
    """The inverse of favouring short requests: a request of 90 % of the tokens gets about 90 % of the rows."""
    counts = [
        sum(name == "long" for name, _ in draw_positions({"long": 900, "short": 100}, bytes([i] * 32), 50))
        for i in range(40)
    ]
    assert 43 < sum(counts) / len(counts) < 47
