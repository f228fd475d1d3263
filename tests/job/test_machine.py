"""The rates of the machine that limits are computed from."""

from __future__ import annotations

import pytest

from isologit.backends.registry import choose_backend
from isologit.job.machine import measure_limits, product_rate, streaming_rate


def test_rates_are_those_of_a_computer() -> None:
    assert 1e9 < product_rate(size=256, repeats=5) < 1e13
    assert 1e8 < streaming_rate(megabytes=32, repeats=1) < 1e12
    assert 1e9 < (choose_backend("cpu").product_rate(1) or 0) < 1e13


def test_a_backend_tells_the_rate_of_its_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_backend("cpu"), "product_rate", lambda num_threads: 7e9)
    assert measure_limits("cpu").tile_flops == 7e9


def test_a_backend_without_products_of_its_own_has_the_library_s_rate() -> None:
    limits = measure_limits("torch")
    assert limits.tile_flops == limits.flops
