"""Every numeric operation once: what it means, inputs to try it on, and how close a provider must come.

A definition is plain torch and is evaluated in float64. A backend lists its providers, functions of the same arguments,
in `backends/NAME/providers.py`; one parametrised test walks them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """One operation: `definition(**inputs)`, `make_inputs(generator)` and how far off a provider may be.

    tolerance: relative to the largest magnitude of the exact result, as the rounding of a sum grows with its terms.
    """

    name: str
    definition: Callable[..., torch.Tensor]
    make_inputs: Callable[[torch.Generator], Inputs]
    tolerance: float

    def allowed(self, exact: torch.Tensor) -> float:
        """The largest absolute difference from this float64 result that is no fault."""
        return self.tolerance * float(exact.abs().max())


def _linear_inputs(generator: torch.Generator) -> Inputs:
    rows = int(torch.randint(1, 40, (1,), generator=generator))
    return {
        "x": torch.randn(rows, 70, generator=generator),
        "weight": torch.randn(45, 70, generator=generator).half().float(),
    }


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, in] x [out, in] -> [T, out]."""
    return x @ weight.T


def _norm_inputs(generator: torch.Generator) -> Inputs:
    return {
        "x": torch.randn(5, 96, generator=generator) * 3,
        "weight": torch.randn(96, generator=generator),
        "eps": 1e-5,
    }


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[T, H] -> [T, H]: x / sqrt(mean(x^2) + eps) * weight."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _swiglu_inputs(generator: torch.Generator) -> Inputs:
    """Weights of a size that gate and up are of order one, where silu bends."""
    rows = int(torch.randint(1, 40, (1,), generator=generator))
    return {
        "x": torch.randn(rows, 70, generator=generator),
        "gate": torch.randn(45, 70, generator=generator) / math.sqrt(70),
        "up": torch.randn(45, 70, generator=generator) / math.sqrt(70),
    }


def _swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[T, in] x two [out, in] -> [T, out]: silu(x @ gate^T) * (x @ up^T) (Shazeer 2020)."""
    gated = x @ gate.T
    return gated * torch.sigmoid(gated) * (x @ up.T)


def _attention_inputs(generator: torch.Generator) -> Inputs:
    heads = int(torch.randint(1, 4, (1,), generator=generator))
    group = int(torch.randint(1, 5, (1,), generator=generator))
    length = int(torch.randint(1, 90, (1,), generator=generator))
    dim = 2 * int(torch.randint(2, 35, (1,), generator=generator))
    return {
        "q": torch.randn(length, heads * group, dim, generator=generator),
        "k": torch.randn(length, heads, dim, generator=generator),
        "v": torch.randn(length, heads, dim, generator=generator),
        "cos": torch.rand(length, dim // 2, generator=generator) * 2 - 1,
        "sin": torch.rand(length, dim // 2, generator=generator) * 2 - 1,
    }


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, then causal grouped-query attention: q [T, heads, D], k and v [T, kv heads, D] -> as q."""
    group = q.shape[1] // k.shape[1]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin).repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[1:]).triu(1).bool()
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def _argmax_inputs(generator: torch.Generator) -> Inputs:
    return {"logits": torch.randint(-20, 20, (6, 301), generator=generator).float()}


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """[R, V] -> [R]: the lowest index of the largest value."""
    return (logits == logits.max(-1, keepdim=True).values).int().argmax(-1)


def _normaliser_inputs(generator: torch.Generator) -> Inputs:
    return {"logits": torch.randn(4, 3000, generator=generator) * 8}


def _normaliser(logits: torch.Tensor) -> torch.Tensor:
    """[R, V] -> [R]: the logarithm of the sum of exponentials."""
    return logits.logsumexp(-1)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("linear", _linear, _linear_inputs, 1e-6),
        Op("rms_norm", _norm, _norm_inputs, 1e-6),
        Op("swiglu", _swiglu, _swiglu_inputs, 2e-6),  # a product of two sums
        Op("paged_attention", _attention, _attention_inputs, 4e-6),
        Op("log_normaliser", _normaliser, _normaliser_inputs, 3e-7),
        Op("argmax", _argmax, _argmax_inputs, 0.0),
    )
}
