"""The numeric schemes of the CUDA backend by name: what products and the cache keep of a float32 value."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Numerics:
    """activation_terms: float16 terms of what a product multiplies with its weights. kv_low: dtype of what float16
    leaves of a key or value; None keeps the float16 term alone.
    """

    activation_terms: int
    kv_low: torch.dtype | None

    @property
    def kv_bytes(self) -> int:
        """Of one key or value."""
        return torch.float16.itemsize + (0 if self.kv_low is None else self.kv_low.itemsize)


# NAME-kvBITS; the first is the default, chosen by the table in docs/cuda.md. The others are for comparison.
SCHEMES = {
    "float16x2-kv24": Numerics(2, torch.float8_e4m3fn),
    "float16x2-kv32": Numerics(2, torch.float16),
    "float16x2-kv16": Numerics(2, None),
    "float16-kv24": Numerics(1, torch.float8_e4m3fn),
    "float16-kv32": Numerics(1, torch.float16),
    "float16-kv16": Numerics(1, None),
}
