"""Biases of the layers' products, laid out like their panels' columns. Models without get four panels of zeros."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from isologit.backends.cpu.kernels import interleave_gate_up
from isologit.backends.cpu.simd import PANEL_WIDTH
from isologit.config import ModelConfig

_PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def pack_biases(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], panels: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The fields `*_bias` of `Weights`, and `*_bias_step` of `Shape`. panels: of each product.

    A product has a bias if any of its parts has one (some models have them for queries, keys and values only); a part
    without counts as zeros.
    """
    features = {
        "self_attn.q_proj": config.num_attention_heads * config.head_dim,
        "self_attn.k_proj": config.num_key_value_heads * config.head_dim,
        "self_attn.v_proj": config.num_key_value_heads * config.head_dim,
        "self_attn.o_proj": config.hidden_size,
        "mlp.gate_proj": config.intermediate_size,
        "mlp.up_proj": config.intermediate_size,
        "mlp.down_proj": config.hidden_size,
    }
    layers = range(config.num_hidden_layers)
    biases: dict[str, np.ndarray] = {}
    steps: dict[str, int] = {}
    for product, parts in _PARTS.items():
        given = any(f"model.layers.{layer}.{part}.bias" in tensors for layer in layers for part in parts)
        packed = np.zeros((len(layers), max(4, panels[product] if given else 0) * PANEL_WIDTH), np.float32)
        for layer in layers if given else ():
            names = [f"model.layers.{layer}.{part}.bias" for part in parts]
            found = [
                tensors[name].float() if name in tensors else torch.zeros(features[part])
                for name, part in zip(names, parts, strict=True)
            ]
            if product == "gate_up":
                columns = interleave_gate_up(found[0][:, None], found[1][:, None])[:, 0]
            else:
                columns = torch.cat(found)
            packed[layer, : len(columns)] = columns.numpy()
        biases[f"{product}_bias"] = packed
        steps[f"{product}_bias_step"] = PANEL_WIDTH if given else 0
    return biases, steps
