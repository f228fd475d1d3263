"""Rotary tables equal transformers' bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from isologit.backends.rope import rope_inv_freq
from isologit.config import PRESETS, ModelConfig, RopeScaling


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 2.0),
        RopeScaling("linear", 3.0),
        RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 32.0, 1.5, 4.5, 64),
    ],
    ids=str,
)
def test_same_tables_as_transformers(head_dim: int, theta: float, scaling: RopeScaling | None) -> None:
    config = ModelConfig(32, 4 * head_dim, 64, 1, 4, 4, head_dim, 4096, rope_theta=theta, rope_scaling=scaling)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config.to_hf_dict()))
    inv_freq = rope_inv_freq(config)
    assert inv_freq.dtype == torch.float32
    assert inv_freq.shape == (head_dim // 2,)
    assert torch.equal(inv_freq, theirs.inv_freq)
    positions = torch.arange(4096)
    angles = torch.outer(positions.float(), inv_freq)
    cos, sin = theirs(torch.zeros(1), positions[None])
    assert torch.equal(cos[0], torch.cat([angles.cos(), angles.cos()], -1))
    assert torch.equal(sin[0], torch.cat([angles.sin(), angles.sin()], -1))


def test_linear_scaling_stretches_positions() -> None:
    plain = PRESETS["llama2-7b"]
    scaled = ModelConfig.from_hf_dict(plain.to_hf_dict() | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "x")
    assert torch.equal(rope_inv_freq(scaled) * 2, rope_inv_freq(plain))
