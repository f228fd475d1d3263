"""Rotary frequencies. Computed in float32 in the order transformers does it, so that the tables agree bit for bit."""

from __future__ import annotations

import math

import torch

from isologit.config import ModelConfig, RopeScaling


def rope_inv_freq(config: ModelConfig) -> torch.Tensor:
    """Inverse frequencies, float32 [head_dim / 2]: the angle of position p in pair i is `p * inv_freq[i]` radians.

    Source: RoFormer (arXiv 2104.09864); "linear" scaling is position interpolation (arXiv 2306.15595), "llama3" is
    that of the LLaMA 3.1 release.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim  # [head_dim / 2]
    inv_freq = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    return _llama3(inv_freq, scaling)


def _llama3(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Divide slow frequencies by the factor, keep fast ones, blend between. [n] -> [n]."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / scaling.factor, inv_freq)
    share = (context / wavelength - low) / (high - low)
    blended = (1 - share) * scaled / scaling.factor + share * scaled
    between = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(between, blended, scaled)
