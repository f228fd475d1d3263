"""Every provider of every operation against its float64 definition, on fresh random inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isologit.ops import cpu
from isologit.ops.registry import OPS, linear_numba, swiglu_numba

PAIRS = [(op.name, provider) for op in OPS.values() for provider in op.providers]


@pytest.mark.parametrize(("name", "provider"), PAIRS)
def test_provider_agrees_with_definition(name: str, provider: str) -> None:
    op = OPS[name]
    for seed in range(12):
        inputs = op.make_inputs(torch.Generator().manual_seed(seed))
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        want = op.reference(**wide)
        got = op.providers[provider](**inputs)
        assert torch.isfinite(got.double()).all()
        assert (got.double() - want.double()).abs().max() <= op.tolerance


def test_a_wrong_provider_is_caught() -> None:
    """The inverse: 1 % more gain is far outside the tolerance of the norm."""
    op = OPS["rms_norm"]
    inputs = op.make_inputs(torch.Generator().manual_seed(0))
    wrong = op.providers["numba"](**{**inputs, "gain": inputs["gain"] * 1.01})
    assert (wrong - op.reference(**inputs)).abs().max() > 100 * op.tolerance


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_product_rows_do_not_depend_on_the_batch(storage: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 130, generator=generator)
    weight = torch.randn(50, 130, generator=generator).to(getattr(torch, storage)).float()
    together = linear_numba(x, weight, storage)
    for first, last in [(0, 1), (3, 5), (2, 5), (7, 11), (4, 9), (10, 17), (20, 28), (3, 12), (13, 40)]:
        assert torch.equal(linear_numba(x[first:last], weight, storage), together[first:last])


def test_gated_rows_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    x, gate, up = (torch.randn(n, 64, generator=generator) for n in (30, 150, 150))
    together = swiglu_numba(x, gate, up)
    for first, last in [(0, 1), (3, 5), (2, 5), (7, 11), (4, 9), (10, 17), (20, 28), (13, 30)]:
        assert torch.equal(swiglu_numba(x[first:last], gate, up), together[first:last])


def test_sixteen_bit_weights_are_widened_exactly() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 64, generator=generator)
    for storage in ("float16", "bfloat16"):
        weight = (torch.randn(32, 64, generator=generator) * 1e-3).to(getattr(torch, storage)).float()
        assert torch.equal(linear_numba(x, weight, storage), linear_numba(x, weight, "float32"))


def test_argmax_reports_nan() -> None:
    row = np.array([1.0, np.nan, 2.0], np.float32)
    assert cpu.argmax_row(row, 0, 3) == -1
    assert cpu.argmax_row(row, 2, 1) == 0
