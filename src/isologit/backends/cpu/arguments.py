"""What the compiled step is given: tuples of arrays and numbers, whose fields it reads by name.

`Shape`, `Weights` and `Scratch` are made once, when a model is loaded or memory reserved; `Work` is a step's own.

NOTE: they are passed as plain tuples and get their names back inside. Numba looks up the type of a plain tuple in C,
that of a named one in Python, holding the interpreter's lock: 10 microseconds more for each thread of each step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """Sizes of the model.

    value_width: float32 that a token's values of one head take in a block. *_bias_step: from one panel's biases to the
    next one's, 0 for a product without.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    value_width: int
    eps: np.float32
    qkv_bias_step: int
    out_bias_step: int
    gate_up_bias_step: int
    down_bias_step: int


class Weights(NamedTuple):
    """All weights but the LM head, and the rotary tables.

    embedding: float32 [vocab, hidden]. input_norms, post_norms: float32 [layers, hidden]. final_norm: float32 [hidden].
    qkv, out, gate_up, down: packed, [layers, panels, in_features, PANEL_WIDTH]. *_bias: float32
    [layers, panels * PANEL_WIDTH], or zeros for four panels. cos, sin: float32 [positions * head_dim / 2].
    """

    embedding: np.ndarray
    input_norms: np.ndarray
    post_norms: np.ndarray
    final_norm: np.ndarray
    qkv: np.ndarray
    out: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    qkv_bias: np.ndarray
    out_bias: np.ndarray
    gate_up_bias: np.ndarray
    down_bias: np.ndarray
    cos: np.ndarray
    sin: np.ndarray


class Head(NamedTuple):
    """The LM head: `panels`, packed [panels, hidden, PANEL_WIDTH], and the same as bytes (`shortlist.ByteHead`)."""

    panels: np.ndarray
    byte_weights: np.ndarray
    byte_columns: np.ndarray


class Work(NamedTuple):
    """One part of a step, or all of it: a `FlatBatch` and its attention.

    first_row, first_logit: where the part's rows and its logits rows begin among those of the step. tiles, items and
    written_first are as in `AttentionWork`; last_* are those of the last layer, in which only `logits_rows` go on.
    counters: int64, zero at first, what the part's threads share; the first line is their barrier's. They are never
    used again, because a thread may still look at its last barrier when the next step begins.
    """

    first_row: int
    first_logit: int
    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    block_tables: np.ndarray
    logits_rows: np.ndarray
    tiles: np.ndarray
    items: np.ndarray
    written_first: np.ndarray
    last_tiles: np.ndarray
    last_items: np.ndarray
    last_written_first: np.ndarray
    counters: np.ndarray


class Scratch(NamedTuple):
    """What a step works in; `sizes.scratch_shapes` says how large each is.

    By row of the step, float32: residual, qkv, attended, and final, what the LM head reads; kept_* hold the rows that
    go on in the last layer. In tiles, as products read them: normed, packed, gated. By thread: queries, scores,
    weights and sums of an attention tile, head_rows of a head, rows and offsets of a product, chunks of a stream.
    """

    residual: np.ndarray
    qkv: np.ndarray
    attended: np.ndarray
    kept_residual: np.ndarray
    kept_attended: np.ndarray
    final: np.ndarray
    normed: np.ndarray
    packed: np.ndarray
    gated: np.ndarray
    queries: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    sums: np.ndarray
    head_rows: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    chunks: np.ndarray


class ChoiceScratch(NamedTuple):
    """What `choose_rows` works in besides.

    row_integers: `shortlist.ROW_DTYPE`, the rows in tiles, and the same memory as int32, row_words. rows_to_take: int32
    [rows]. factors: float32 [rows, 3]. tops: float32 [panels * rows]. row_tops: float32 [threads, panels].
    """

    row_integers: np.ndarray
    row_words: np.ndarray
    rows_to_take: np.ndarray
    factors: np.ndarray
    tops: np.ndarray
    row_tops: np.ndarray
