"""Every provider of every operation against its float64 definition, on fresh random inputs.

The CUDA kernels are among them where there is a GPU, or Triton's interpreter is on (`tests/backends/cuda` turns it on).
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from isologit.backends.cpu.providers import PROVIDERS as CPU
from isologit.backends.cuda.backend import CUDABackend
from isologit.backends.torch.providers import PROVIDERS as TORCH
from isologit.ops.definitions import OPS

BACKENDS = {"cpu": CPU, "torch": TORCH}
if CUDABackend.why_not("auto") is None:
    BACKENDS["cuda"] = import_module("isologit.backends.cuda.providers").PROVIDERS
TRIPLES = [(b, name, p) for b, listed in BACKENDS.items() for name, found in listed.items() for p in found]


@pytest.mark.parametrize(("backend", "name", "provider"), TRIPLES)
def test_provider_agrees_with_definition(backend: str, name: str, provider: str) -> None:
    op = OPS[name]
    for seed in range(12 if backend != "cuda" else 4):  # an interpreter is slow
        inputs = op.make_inputs(torch.Generator().manual_seed(seed))
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        want = op.definition(**wide)
        got = BACKENDS[backend][name][provider](**inputs)
        assert torch.isfinite(got.double()).all()
        assert (got.double() - want.double()).abs().max() <= op.allowed(want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operation_has_a_provider(backend: str) -> None:
    assert set(BACKENDS[backend]) == set(OPS)


def test_a_wrong_provider_is_caught() -> None:
    """The inverse: 1 % more weight is far outside the tolerance of the norm."""
    op = OPS["rms_norm"]
    inputs = op.make_inputs(torch.Generator().manual_seed(0))
    wrong = CPU["rms_norm"]["numba"](**{**inputs, "weight": inputs["weight"] * 1.01})
    want = op.definition(**inputs)
    assert (wrong - want).abs().max() > 100 * op.allowed(want)
