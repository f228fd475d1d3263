"""The plain torch model's parts as providers of `isologit.ops`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from isologit.backends.torch.model import Group, Linear, attention, rms_norm, rotate, swiglu


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return Linear(weight, None)(x)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm(x, weight, eps)


def _swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return swiglu(x, Linear(gate, None), Linear(up, None))


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The sequence through scattered slots of a cache; what was not written is NaN, which the result would show."""
    length = len(q)
    slots = torch.arange(2 * length - 1, -1, -2)
    keys, values = (torch.full((2 * length, *part.shape[1:]), torch.nan) for part in (k, v))
    keys[slots], values[slots] = rotate(k, cos, sin), v
    visible = torch.ones(1, length, length, dtype=torch.bool).tril()
    return attention(rotate(q, cos, sin), keys, values, [Group(torch.arange(length)[None], slots[None], visible)])


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def _log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().logsumexp(-1)


PROVIDERS: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
    "linear": {"torch": _linear},
    "rms_norm": {"torch": _rms_norm},
    "swiglu": {"torch": _swiglu},
    "paged_attention": {"torch": _attention},
    "log_normaliser": {"torch": _log_normaliser},
    "argmax": {"torch": _argmax},
}
