"""Rotary tables equal transformers' bit for bit."""

from __future__ import annotations

import copy
from typing import Any

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


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "fields",
    [
        {
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 64}},
        {
            "rope_parameters": {"rope_theta": 5e5, "type": "linear", "factor": 4.0},
            "rope_scaling": {"rope_type": "default"},
        },
        {
            "rope_parameters": {"rope_theta": 5e5},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4},
        },
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 7e4, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 7e4, "rope_scaling": {}},
        {"rope_parameters": None, "rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": dict(_LLAMA3)},
        {"rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 128},
    ],
    ids=str,
)
def test_same_frequencies_of_any_spelling(fields: dict[str, Any]) -> None:
    d = {key: v for key, v in PRESETS["llama-110m"].to_hf_dict().items() if not key.startswith("rope")} | fields
    theirs = LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(d)))
    assert torch.equal(rope_inv_freq(ModelConfig.from_hf_dict(d, "x")), theirs.inv_freq)


def test_linear_scaling_stretches_positions() -> None:
    plain = PRESETS["llama2-7b"]
    scaled = ModelConfig.from_hf_dict(plain.to_hf_dict() | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "x")
    assert torch.equal(rope_inv_freq(scaled) * 2, rope_inv_freq(plain))
