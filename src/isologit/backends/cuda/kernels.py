"""The Triton kernels. Sums run in an order that depends on the model's shape alone, never on the batch.

A "pair" is a float32 tensor as the sum of two float16 ones, [2, T, features]: what float16 keeps of it, and what that
leaves. Products of a pair with float16 weights on tensor cores have nearly the error of float32 ones. Features are
padded (`sizes.padded`), where pairs and weights hold zeros.

Keys and values are kept as a float16 term and, in FP8 e4m3 or float16, `2**14` times what that leaves; with KV_TERMS 1
as the float16 term alone. A block of a layer is [keys or values, KV heads, block size, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOW_SCALE = tl.constexpr(16384.0)  # of the FP8 term of keys and values: what float16 leaves of 32 becomes 256
_E4M3_MAX = tl.constexpr(448.0)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _store_pair(pointer, low_offset, x, mask):
    high = x.to(tl.float16)
    tl.store(pointer, high, mask=mask)
    tl.store(pointer + low_offset, (x - high.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit
def take_chosen(tokens, chosen, count, BLOCK: tl.constexpr):
    """Put what the last step chose where a token id stands for it: -1 - r becomes `chosen[r]`, or 0 if that is -1."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row, mask=row < count, other=0)
    known = tl.load(chosen - 1 - token, mask=token < 0, other=0)
    tl.store(tokens + row, tl.where(token < 0, tl.maximum(known, 0), token), mask=row < count)


@triton.jit
def linear(
    pair, low_row, scales, weight, out, num_rows, out_features, in_features,
    SCALED: tl.constexpr, TERMS: tl.constexpr, K_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """pair x weight [out, in] -> float32 [K_SPLITS, T, out], each split a part of the sum over `in`.

    pair, weight: descriptors for the tensor memory accelerator; the pair's is [2 * T, in], and its low term begins at
    `low_row`. Both products of a weight tile follow each other, so weights are read once. scales: float32 [T], of each
    row, if SCALED. TERMS: 1 leaves the low term out. All sizes must be multiples of their blocks.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    tiles_m = num_rows // BLOCK_M
    row, column = (pid % tiles_m) * BLOCK_M, (pid // tiles_m) * BLOCK_N  # neighbours share a weight tile
    per_split = tl.cdiv(in_features // BLOCK_K, K_SPLITS) * BLOCK_K
    first = split * per_split
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, min(first + per_split, in_features), BLOCK_K):
        tile = weight.load([column, k]).T
        acc = tl.dot(pair.load([row, k]), tile, acc)
        if TERMS == 2:
            acc = tl.dot(pair.load([low_row + row, k]), tile, acc)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    if SCALED:
        acc *= tl.load(scales + rows)[:, None]
    tl.store(out + split * num_rows * out_features + rows[:, None] * out_features + columns[None, :], acc)


@triton.jit
def linear_narrow(
    pair, low_offset, scales, weight, out, num_rows, out_features, in_features,
    SCALED: tl.constexpr, TERMS: tl.constexpr, K_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`linear` for few rows: the weight tile is the first operand, of which tensor cores take 64 rows at least.

    pair, weight: addresses. Bit for bit what `linear` gives.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    tiles_m = num_rows // BLOCK_M
    rows = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (pid // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    per_split = tl.cdiv(in_features // BLOCK_K, K_SPLITS) * BLOCK_K
    first = split * per_split
    high_pointers = pair + rows[None, :] * in_features + (first + k)[:, None]
    weight_pointers = weight + columns[:, None] * in_features + (first + k)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(first, min(first + per_split, in_features), BLOCK_K):
        tile = tl.load(weight_pointers)
        acc = tl.dot(tile, tl.load(high_pointers), acc)
        if TERMS == 2:
            acc = tl.dot(tile, tl.load(high_pointers + low_offset), acc)
        high_pointers += BLOCK_K
        weight_pointers += BLOCK_K
    if SCALED:
        acc *= tl.load(scales + rows)[None, :]
    tl.store(out + split * num_rows * out_features + rows[None, :] * out_features + columns[:, None], acc)


@triton.jit
def add_norm(
    residual, parts, part_stride, part_width, bias, weight, pair, low_offset, pair_width, index, final, hidden, eps,
    NUM_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Residual plus the parts of a product (and bias), then RMSNorm, as a pair. One program a row.

    INDEX "none": row by row, the residual is updated. "embedding": the residual is row `index` of the embedding, which
    `parts` holds. "final": output row r is row `index[r]`, kept in `final` too; the residual stays.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    source = row
    if INDEX != "none":
        source = tl.load(index + row)
    if INDEX == "embedding":
        x = tl.load(parts + source.to(tl.int64) * hidden + column, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(residual + source * hidden + column, mask=inside, other=0.0)
        for part in tl.static_range(NUM_PARTS):
            x += tl.load(parts + part * part_stride + source * part_width + column, mask=inside, other=0.0)
        if HAS_BIAS:
            x += tl.load(bias + column, mask=inside, other=0.0)
    if INDEX != "final":
        tl.store(residual + row * hidden + column, x, mask=inside)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / hidden + eps)
    y = x * inverse * tl.load(weight + column, mask=inside, other=0.0)
    if INDEX == "final":
        tl.store(final + row * hidden + column, y, mask=inside)
    _store_pair(pair + row * pair_width + column, low_offset, y, inside)


@triton.jit
def split_rows(x, pair, low_offset, pair_width, hidden, BLOCK: tl.constexpr):
    """float32 [T, hidden] as a pair. One program a row."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    y = tl.load(x + row * hidden + column, mask=inside, other=0.0)
    _store_pair(pair + row * pair_width + column, low_offset, y, inside)


@triton.jit
def rotate_and_cache(
    qkv, qkv_width, bias, cos, sin, positions, slots, queries, low_offset, kv_high, kv_low, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_TERMS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotary embedding; queries times `scale` become a pair [2, T, heads, D], keys and values go to their slots.

    One program a token and BLOCK_HEADS of its query, key and value heads. HALF: D / 2 or the next power of two.
    """
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair_index = tl.arange(0, HALF)
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (pair_index < HEAD_DIM // 2)[None, :]
    column = head[:, None] * HEAD_DIM + pair_index[None, :]
    a = tl.load(qkv + token * qkv_width + column, mask=inside, other=0.0)
    b = tl.load(qkv + token * qkv_width + column + HEAD_DIM // 2, mask=inside, other=0.0)
    if HAS_BIAS:
        a += tl.load(bias + column, mask=inside, other=0.0)
        b += tl.load(bias + column + HEAD_DIM // 2, mask=inside, other=0.0)
    angle = tl.load(positions + token) * (HEAD_DIM // 2) + pair_index
    turned = (head < HEADS + KV_HEADS)[:, None]
    c = tl.where(turned, tl.load(cos + angle, mask=pair_index < HEAD_DIM // 2, other=0.0)[None, :], 1.0)
    s = tl.where(turned, tl.load(sin + angle, mask=pair_index < HEAD_DIM // 2, other=0.0)[None, :], 0.0)
    left, right = a * c - b * s, b * c + a * s
    is_query = inside & (head < HEADS)[:, None]
    query = queries + token * HEADS * HEAD_DIM + column
    _store_pair(query, low_offset, left * scale, is_query)
    _store_pair(query + HEAD_DIM // 2, low_offset, right * scale, is_query)
    slot = tl.load(slots + token).to(tl.int64)
    kv_head = head - HEADS  # keys, then values
    is_kv = inside & (head >= HEADS)[:, None]
    place = (slot // BLOCK_SIZE * 2 * KV_HEADS + kv_head[:, None]) * BLOCK_SIZE + slot % BLOCK_SIZE
    place = place * HEAD_DIM + pair_index[None, :]
    _store_kv(kv_high, kv_low, place, left, is_kv, KV_TERMS)
    _store_kv(kv_high, kv_low, place + HEAD_DIM // 2, right, is_kv, KV_TERMS)


@triton.jit
def _store_kv(kv_high, kv_low, place, x, mask, KV_TERMS: tl.constexpr):
    high = x.to(tl.float16)
    tl.store(kv_high + place, high, mask=mask)
    if KV_TERMS == 2:
        low = (x - high.to(tl.float32)) * _LOW_SCALE
        if kv_low.dtype.element_ty == tl.float8e4nv:
            low = tl.clamp(low, -_E4M3_MAX, _E4M3_MAX)
        tl.store(kv_low + place, low.to(kv_low.dtype.element_ty), mask=mask)


@triton.jit
def attention(
    queries, query_low, kv_high, kv_low, tiles, num_tiles, tables, table_width, out, out_low, out_width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Paged causal attention for prompt, decode and draft tokens alike: one program a tile of tokens and a KV head.

    tiles: int32 [n, 4], first row, tokens, first position, row of the block table. A tile's rows are its tokens times
    the query heads of the KV head, BLOCK_M at most. Keys are taken BLOCK_N at a time from position 0 on, so a row's
    result does not depend on its tile. Queries hold the softmax's scale. Flash attention (Dao et al. 2022).
    """
    number, kv_head = tl.program_id(0), tl.program_id(1)
    if number >= tl.load(num_tiles):
        return
    first_row, count = tl.load(tiles + number * 4), tl.load(tiles + number * 4 + 1)
    position, table = tl.load(tiles + number * 4 + 2), tl.load(tiles + number * 4 + 3)
    table_start = tables + table * tl.load(table_width)
    group: tl.constexpr = HEADS // KV_HEADS
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token = m // group
    inside = (token < count)[:, None] & (d < HEAD_DIM)[None, :]
    head = kv_head * group + m % group
    columns = head[:, None] * HEAD_DIM + d[None, :]
    query = queries + (first_row + token)[:, None] * HEADS * HEAD_DIM + columns
    q_high = tl.load(query, mask=inside, other=0.0)
    q_low = tl.load(query + query_low, mask=inside, other=0.0)
    last = position + tl.minimum(token, count - 1)  # a row sees positions up to its own
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    values_offset: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_DIM
    for start in range(0, position + count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        exists = n < position + count
        block = tl.load(table_start + n // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        place = ((block * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + n % BLOCK_SIZE) * HEAD_DIM
        place = place[:, None] + d[None, :]
        there = exists[:, None] & (d < HEAD_DIM)[None, :]
        k_high = tl.trans(tl.load(kv_high + place, mask=there, other=0.0))
        if KV_TERMS == 2:
            k_low = tl.trans(tl.load(kv_low + place, mask=there, other=0.0).to(tl.float16))
        v_high = tl.load(kv_high + values_offset + place, mask=there, other=0.0)
        if KV_TERMS == 2:
            v_low = tl.load(kv_low + values_offset + place, mask=there, other=0.0).to(tl.float16)
            scores = tl.dot(q_high, k_high) + (tl.dot(q_low, k_high) + tl.dot(q_high, k_low) * (1.0 / _LOW_SCALE))
        else:
            scores = tl.dot(q_high, k_high) + tl.dot(q_low, k_high)
        scores = tl.where(n[None, :] <= last[:, None], scores * _LOG2_E, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        p_high = p.to(tl.float16)
        p_low = (p - p_high.to(tl.float32)).to(tl.float16)
        if KV_TERMS == 2:
            added = tl.dot(p_high, v_high) + (tl.dot(p_low, v_high) + tl.dot(p_high, v_low) * (1.0 / _LOW_SCALE))
        else:
            added = tl.dot(p_high, v_high) + tl.dot(p_low, v_high)
        acc = acc * shrink[:, None] + added
        largest = larger
    place_out = out + (first_row + token)[:, None] * out_width + columns
    _store_pair(place_out, out_low, acc / total[:, None], inside)


@triton.jit
def silu_mul(
    gate_up, width, bias, pair, low_offset, pair_width, scales, features,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up as a pair, each row divided by the power of two `scales` that brings it into float16's range.

    gate_up: float32 [T, 2 * width], the gate's features first, then the other's. One program a row.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < features
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0)
    if HAS_BIAS:
        gate += tl.load(bias + column, mask=inside, other=0.0)
        up += tl.load(bias + width + column, mask=inside, other=0.0)
    x = gate / (1.0 + tl.exp(-gate)) * up
    largest = tl.max(tl.abs(x), 0)
    scale = tl.exp2(tl.ceil(tl.log2(tl.maximum(largest, 1e-30))) - 14.0)
    tl.store(scales + row, scale)
    _store_pair(pair + row * pair_width + column, low_offset, x / scale, inside)


@triton.jit
def argmax(logits, width, vocab, out, BLOCK: tl.constexpr):
    """Index of the largest logit of each row, the lowest on ties, -1 where there is NaN. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((), float("-inf"), tl.float32)
    where = tl.full((), 0, tl.int32)
    broken = tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * width + column, mask=column < vocab, other=float("-inf"))
        broken = tl.maximum(broken, tl.max((x != x).to(tl.int32), 0))
        top = tl.max(x, 0)
        first = tl.min(tl.where(x == top, column, vocab), 0)
        where = tl.where(top > best, first, where)
        best = tl.maximum(best, top)
    tl.store(out + row, tl.where(broken > 0, -1, where))
