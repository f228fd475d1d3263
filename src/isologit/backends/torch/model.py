"""LLaMA in plain torch, in the order of the paper: embedding, layers of attention and SwiGLU, RMSNorm, LM head.

It sees tokens, positions and slots of the key/value cache; which sequence a token belongs to is in its `Group`. All
arithmetic is float32. Sources: LLaMA (Touvron et al. 2023), RMSNorm (Zhang and Sennrich 2019), rotary embedding
(Su et al. 2021), SwiGLU (Shazeer 2020), grouped-query attention (Ainslie et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from isologit.backends.rope import rope_inv_freq
from isologit.config import ModelConfig


class Linear(NamedTuple):
    """y = x @ weight^T + bias; weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Layer(NamedTuple):
    """Weights of one decoder layer."""

    input_norm: Tensor  # [hidden]
    q: Linear  # [heads * D, hidden]
    k: Linear  # [kv heads * D, hidden]
    v: Linear
    o: Linear  # [hidden, heads * D]
    post_norm: Tensor
    gate: Linear  # [intermediate, hidden]
    up: Linear
    down: Linear  # [hidden, intermediate]


class Group(NamedTuple):
    """G sequences that have the same number n of tokens in this step, and the longest context C among them.

    rows: [G, n], their tokens in the batch. slots: [G, C], where their keys and values are. visible: bool [G, n, C].
    """

    rows: Tensor
    slots: Tensor
    visible: Tensor


class KVCache(NamedTuple):
    """Paged keys and values, float32 [layers, slots, kv heads, D] each."""

    keys: Tensor
    values: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H] -> [T, H]: x / sqrt(mean(x^2) + eps) * weight."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, D]; cos and sin [T, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(q: Tensor, keys: Tensor, values: Tensor, groups: Sequence[Group]) -> Tensor:
    """Causal grouped-query attention over the cache: q [T, heads, D], keys and values [slots, kv heads, D] -> as q."""
    out = torch.empty_like(q)
    share = q.shape[1] // keys.shape[1]  # query heads of a KV head
    for rows, slots, visible in groups:
        queries = q[rows].reshape(*rows.shape, -1, share, q.shape[-1])  # [G, n, kv heads, share, D]
        scores = torch.einsum("gnksd,gckd->gksnc", queries, keys[slots]) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~visible[:, None, None], -math.inf).softmax(-1)
        out[rows] = torch.einsum("gksnc,gckd->gnksd", weights, values[slots]).flatten(2, 3)
    return out


def swiglu(x: Tensor, gate: Linear, up: Linear) -> Tensor:
    """[T, hidden] -> [T, intermediate]: silu(gate(x)) * up(x)."""
    return silu(gate(x)) * up(x)


class Llama:
    """Weights and forward pass. Tied models have no `lm_head.weight`."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.config = config

        def get(name: str) -> Tensor:
            return tensors[name].to(device, torch.float32)

        def get_linear(name: str) -> Linear:
            bias = get(f"{name}.bias") if f"{name}.bias" in tensors else None
            return Linear(get(f"{name}.weight"), bias)

        def get_layer(prefix: str) -> Layer:
            q, k, v, o = (get_linear(f"{prefix}.self_attn.{name}_proj") for name in "qkvo")
            gate, up, down = (get_linear(f"{prefix}.mlp.{name}_proj") for name in ("gate", "up", "down"))
            input_norm = get(f"{prefix}.input_layernorm.weight")
            post_norm = get(f"{prefix}.post_attention_layernorm.weight")
            return Layer(input_norm, q, k, v, o, post_norm, gate, up, down)

        self.embedding = get("model.embed_tokens.weight")
        self.layers = [get_layer(f"model.layers.{i}") for i in range(config.num_hidden_layers)]
        self.norm = get("model.norm.weight")
        self.head = self.embedding if config.tie_word_embeddings else get("lm_head.weight")
        self.inv_freq = rope_inv_freq(config).to(device)

    def weights(self) -> Iterator[Tensor]:
        """Every weight once."""
        yield self.embedding
        yield self.norm
        if self.head is not self.embedding:
            yield self.head
        for layer in self.layers:
            for part in layer:
                yield from (w for w in (part if isinstance(part, Linear) else (part,)) if w is not None)

    def forward(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, groups: Sequence[Group], cache: KVCache, rows: Tensor
    ) -> Tensor:
        """Write keys and values of T tokens to their slots; the normed hidden states of `rows`, [R, hidden]."""
        c = self.config
        angles = positions[:, None].float() * self.inv_freq  # [T, D / 2]
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding[tokens]  # [T, hidden]
        for layer, keys, values in zip(self.layers, *cache, strict=True):
            h = rms_norm(x, layer.input_norm, c.rms_norm_eps)
            q, k, v = (part(h).view(len(h), -1, c.head_dim) for part in (layer.q, layer.k, layer.v))
            keys[slots], values[slots] = rotate(k, cos, sin), v
            x = x + layer.o(attention(rotate(q, cos, sin), keys, values, groups).flatten(1))
            h = rms_norm(x, layer.post_norm, c.rms_norm_eps)
            x = x + layer.down(swiglu(h, layer.gate, layer.up))
        return rms_norm(x[rows], self.norm, c.rms_norm_eps)

    def logits(self, final: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab]."""
        return linear(final, self.head)
