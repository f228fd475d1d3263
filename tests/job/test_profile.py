"""The profile of a run: parts that sum to the whole, and rates that follow from the operations."""

from __future__ import annotations

from typing import Any

import pytest

from isologit.config import preset
from isologit.job.machine import MachineLimits
from isologit.job.profile import LAYER_PRODUCTS, profile

CONFIG = preset("llama-110m")


def step(start: float, end: float, tokens: int, logits: int) -> dict[str, Any]:
    return {
        "start_s": start, "end_s": end, "execute_s": 0.9 * (end - start), "sample_s": 0.01, "capture_s": 0.02,
        "num_tokens": tokens, "num_logits": logits,
    }  # fmt: skip


def test_shares_sum_to_one_and_rates_follow() -> None:
    steps = [step(0.0, 1.0, 100, 50), step(1.0, 2.0, 1, 1)]
    phases = dict.fromkeys(LAYER_PRODUCTS, 0.2) | {"head": 0.2, "attention": 0.3, "elementwise": 0.2, "argmax": 0.1}
    found = profile(steps, phases, CONFIG, MachineLimits(1e12, 2e12, 1e10), weight_bytes=10**9, step_bytes=9 * 10**8)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["products"] == pytest.approx(0.5)
    assert found["shares"]["sampling"] == pytest.approx(0.06)
    assert found["host_share"] == pytest.approx(0.2)
    in_layers = CONFIG.product_flop(100, 50) + CONFIG.product_flop(1, 1) - 51 * 2 * 768 * 32000
    assert found["product_gflops"] == pytest.approx(in_layers / 0.8 / 1e9)
    assert found["narrow_steps"] == 1
    assert found["narrow_step_gb_per_s"] == pytest.approx(0.9 / 0.9)
    assert found["limit_s"] == pytest.approx(0.1 + 0.1)
    assert found["limit_over_time"] == pytest.approx(0.1)


def test_waiting_has_a_name_and_is_not_scheduling() -> None:
    limits = MachineLimits(1e12, 2e12, 1e10)
    phases = dict.fromkeys(LAYER_PRODUCTS, 0.1) | {"wait": 0.3, "copy": 0.2}
    found = profile([step(0.0, 1.0, 9, 9)], phases, CONFIG, limits, weight_bytes=1, step_bytes=1)
    assert found["shares"]["waiting"] == pytest.approx(0.3)
    assert found["shares"]["other"] == pytest.approx(0.2)
    assert found["shares"]["scheduler"] == pytest.approx(1 - 0.4 - 0.3 - 0.2 - 0.03)


def test_a_backend_that_counts_no_phases_has_a_profile() -> None:
    found = profile([step(0.0, 1.0, 9, 9)], {}, CONFIG, MachineLimits(1e12, 2e12, 1e10), weight_bytes=1, step_bytes=1)
    assert found["product_gflops"] is None
    assert sum(found["shares"].values()) == pytest.approx(1)
