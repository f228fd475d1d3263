"""Shapes of weights, caches and buffers of the CUDA backend, known before anything is loaded."""

from __future__ import annotations

import math

import torch

from isologit.backends.cuda.tiles import K_SPLITS
from isologit.config import ModelConfig

BLOCK_SIZE = 16  # tokens of a block of keys and values
_FEATURES = 128  # products read and write features in multiples of these

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def padded(features: int) -> int:
    """Features of a matrix as kept."""
    return -(-features // _FEATURES) * _FEATURES


def product_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) features of every product, padded."""
    c = config
    heads = c.num_attention_heads * c.head_dim
    hidden = padded(c.hidden_size)
    return {
        "qkv": (padded(heads + 2 * c.num_key_value_heads * c.head_dim), hidden),
        "out": (hidden, padded(heads)),
        "gate_up": (2 * padded(c.intermediate_size), hidden),
        "down": (hidden, padded(c.intermediate_size)),
        "head": (padded(c.vocab_size), hidden),
    }


def product_bytes(config: ModelConfig) -> int:
    """Bytes of the weights of all products: what a step reads."""
    sizes = {name: 2 * math.prod(shape) for name, shape in product_sizes(config).items()}
    head = sizes.pop("head")
    return config.num_hidden_layers * sum(sizes.values()) + head


def weight_bytes(config: ModelConfig, max_model_len: int) -> int:
    """Bytes of all that is loaded: products, embedding, norms, biases, rotary tables."""
    c, sizes = config, product_sizes(config)
    norms = 4 * c.hidden_size * (2 * c.num_hidden_layers + 1)
    biased = [n for n, wanted in (("qkv", c.attention_bias), ("out", c.attention_bias)) if wanted]
    biased += ["gate_up", "down"] if c.mlp_bias else []
    biases = 4 * c.num_hidden_layers * sum(sizes[name][0] for name in biased)
    tables = 4 * max_model_len * c.head_dim
    return product_bytes(c) + 2 * c.vocab_size * c.hidden_size + norms + biases + tables


def kv_block_bytes(config: ModelConfig, kv_bytes: int) -> int:
    """Bytes of one block's keys and values over all layers; `kv_bytes` of each."""
    c = config
    return kv_bytes * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * BLOCK_SIZE


def buffer_shapes(config: ModelConfig, num_rows: int) -> Shapes:
    """What steps of up to `num_rows` rows work in."""
    c, t, sizes = config, num_rows, product_sizes(config)
    heads = c.num_attention_heads * c.head_dim
    float32, float16 = torch.float32, torch.float16
    return {
        "residual": ((t, c.hidden_size), float32),
        "normed": ((2, t, padded(c.hidden_size)), float16),
        "qkv": ((t, sizes["qkv"][0]), float32),
        "queries": ((2, t, heads), float16),
        "attended": ((2, t, padded(heads)), float16),
        "parts": ((K_SPLITS, t, padded(c.hidden_size)), float32),
        "gate_up": ((t, sizes["gate_up"][0]), float32),
        "gated": ((2, t, padded(c.intermediate_size)), float16),
        "scales": ((t,), float32),
        "final": ((t, c.hidden_size), float32),
        "kept": ((2, t, c.hidden_size), float32),  # "final" of the last two steps
        "logits": ((t, sizes["head"][0]), float32),
        "chosen": ((t,), torch.int32),
    }


def buffer_bytes(config: ModelConfig, num_rows: int) -> int:
    """Bytes of `buffer_shapes`."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in buffer_shapes(config, num_rows).values())
