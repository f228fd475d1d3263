"""Choosing a token at the edges of what a request may ask for."""

from __future__ import annotations

import numpy as np
import pytest

from isologit.engine.request import SamplingParams
from isologit.engine.sampler import Sampler

ROW = np.array([1.0, 3.0, -2.0, 0.5], np.float32)


def _choose(seen: list[int], **params: float) -> int:
    return Sampler(SamplingParams(max_tokens=4, **params), np.random.default_rng(0)).choose(ROW, seen, len(seen))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0])
@pytest.mark.parametrize(("penalty", "chosen"), [(1e-320, {0, 1}), (1e-5, {1}), (1e308, {0, 1, 3})])
def test_an_extreme_repetition_penalty_still_chooses(penalty: float, chosen: set[int], temperature: float) -> None:
    """Near 0, what was seen wins; very large, what it makes unlikely is never chosen."""
    seen = [0, 1] if penalty < 1 else [0, 1, 2]
    assert _choose(seen, repetition_penalty=penalty, temperature=temperature) in chosen


def test_without_a_penalty_the_largest_wins() -> None:
    assert _choose([1], temperature=0.0) == 1
