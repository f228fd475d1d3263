"""How large everything is that the CPU backend keeps: known from the configuration, before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from isologit.backends.base import LoadOptions, Memory
from isologit.backends.cpu.heads import MAX_CHUNKS
from isologit.backends.cpu.kernels import COUNTER_STRIDE, SCRATCH_SIZE, kv_block_size, panel_count
from isologit.backends.cpu.packing import packed_bytes
from isologit.backends.cpu.shortlist import ROW_DTYPE
from isologit.backends.cpu.simd import BYTE_PRODUCTS, PANEL_WIDTH, TILE_ROWS
from isologit.common.compiler import VECTOR_WIDTH
from isologit.config import ModelConfig

Shapes = dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype by name

TABLES = ("qkv_bias", "out_bias", "gate_up_bias", "down_bias", "cos", "sin")  # beside the packed weights


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def tile_tokens(config: ModelConfig) -> int:
    """Tokens of an attention tile: as many as have a register tile's rows of queries for one KV head."""
    return max(1, TILE_ROWS // (config.num_attention_heads // config.num_key_value_heads))


def value_width(config: ModelConfig) -> int:
    """float32 that one token's values of one head take in a block."""
    return round_up(config.head_dim, PANEL_WIDTH)


def kv_block_bytes(config: ModelConfig) -> int:
    """Bytes of keys and values of one block over all layers."""
    block: int = kv_block_size(config.head_dim, value_width(config))
    return 4 * config.num_hidden_layers * config.num_key_value_heads * block


def table_shapes(config: ModelConfig, max_model_len: int) -> Shapes:
    """What is kept beside the packed weights: the fields of `arguments.Weights` that TABLES names."""
    c, layers = config, config.num_hidden_layers
    qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    panels = {
        "qkv_bias": panel_count(qkv) if c.attention_bias else 0,
        "out_bias": panel_count(c.hidden_size) if c.attention_bias else 0,
        "gate_up_bias": -(-c.intermediate_size // VECTOR_WIDTH) if c.mlp_bias else 0,
        "down_bias": panel_count(c.hidden_size) if c.mlp_bias else 0,
    }
    shapes: Shapes = {name: ((layers, max(4, count) * PANEL_WIDTH), np.float32) for name, count in panels.items()}
    angles = (max_model_len * (c.head_dim // 2),)
    return shapes | {"cos": (angles, np.float32), "sin": (angles, np.float32)}


def scratch_shapes(config: ModelConfig, max_model_len: int, num_threads: int, num_tokens: int) -> Shapes:
    """The fields of `arguments.Scratch` for steps of up to `num_tokens` tokens."""
    c, tokens = config, num_tokens
    group = c.num_attention_heads // c.num_key_value_heads
    tile_rows = tile_tokens(c) * group
    heads_size = c.num_attention_heads * c.head_dim
    residual = (tokens, round_up(c.hidden_size, PANEL_WIDTH))
    qkv_panels = panel_count(heads_size + 2 * c.num_key_value_heads * c.head_dim)
    context = round_up(max_model_len, PANEL_WIDTH) + PANEL_WIDTH
    return {
        "residual": (residual, np.float32),
        "qkv": ((tokens, qkv_panels * PANEL_WIDTH), np.float32),
        "attended": ((tokens, heads_size), np.float32),
        "kept_residual": (residual, np.float32),
        "kept_attended": ((tokens, heads_size), np.float32),
        "final": ((tokens, c.hidden_size), np.float32),
        "normed": ((tokens * c.hidden_size,), np.float32),
        "packed": ((tokens * heads_size,), np.float32),
        "gated": ((tokens * round_up(c.intermediate_size, VECTOR_WIDTH),), np.float32),
        "queries": ((num_threads, tile_rows * value_width(c)), np.float32),
        "scores": ((num_threads, tile_rows, context), np.float32),
        "weights": ((num_threads, tile_rows * context), np.float32),
        "sums": ((num_threads, max(tile_rows, TILE_ROWS)), np.float32),
        "head_rows": ((num_threads, 2 * tokens * (group + 2) * c.head_dim), np.float32),
        "rows": ((num_threads, SCRATCH_SIZE), np.float32),
        "offsets": ((num_threads, round_up(TILE_ROWS, COUNTER_STRIDE)), np.int64),
        "chunks": ((num_threads, MAX_CHUNKS + COUNTER_STRIDE), np.int64),
    }


def choice_shapes(config: ModelConfig, num_threads: int, num_tokens: int) -> Shapes:
    """The fields of `arguments.ChoiceScratch` but `row_words`."""
    panels = panel_count(config.vocab_size)
    return {
        "row_integers": ((num_tokens * config.hidden_size,), ROW_DTYPE),
        "rows_to_take": ((num_tokens,), np.int32),
        "factors": ((num_tokens, 3), np.float32),
        "tops": ((num_tokens * panels,), np.float32),
        "row_tops": ((num_threads, round_up(panels, TILE_ROWS)), np.float32),
    }


def nbytes(shapes: Shapes) -> int:
    """Bytes of arrays of these shapes."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())


def plan_memory(config: ModelConfig, options: LoadOptions, num_tokens: int) -> Memory:
    """What a model and steps of up to `num_tokens` tokens take."""
    scratch = scratch_shapes(config, options.max_model_len, options.num_threads, num_tokens)
    if BYTE_PRODUCTS:
        scratch |= choice_shapes(config, options.num_threads, num_tokens)
    weights = packed_bytes(config) + nbytes(table_shapes(config, options.max_model_len))
    return Memory(weights, kv_block_bytes(config), nbytes(scratch))
