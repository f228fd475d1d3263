"""The rates of the machine that limits are computed from."""

from __future__ import annotations

from isologit.job.machine import product_rate, streaming_rate, tile_rate


def test_rates_are_those_of_a_computer() -> None:
    assert 1e9 < tile_rate(1, repeats=1) < 1e13
    assert 1e9 < product_rate(size=256, repeats=1) < 1e13
    assert 1e8 < streaming_rate(megabytes=32, repeats=1) < 1e12
