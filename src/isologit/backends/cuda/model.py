"""A LLaMA's weights on the GPU, the buffers of a step, and the kernels of a step in their order.

It knows addresses and sizes, not requests: what a step computes is in the integers of `StepInputs`. Everything it
launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from isologit.backends.cuda import kernels
from isologit.backends.cuda.sizes import BLOCK_SIZE, buffer_shapes, padded
from isologit.backends.cuda.tiles import BLOCK_K, K_SPLITS, NARROW_ROWS, tile_for
from isologit.backends.rope import rope_inv_freq
from isologit.config import ModelConfig
from isologit.errors import ModelError

_TILE_ROWS = 16  # of an attention program: the least a tensor core takes
_TILE_KEYS = 16  # with one warp, so that many programs wait for memory at once
_HEADS_AT_ONCE = 8  # of a program that rotates


class Product(NamedTuple):
    """float16 weight [out, in], both padded; float32 bias [out], or None."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """Weights of one decoder layer; norms are float32 [hidden]."""

    input_norm: Tensor
    qkv: Product
    out: Product
    post_norm: Tensor
    gate_up: Product  # gate's features, padded, then up's
    down: Product


class KVCache(NamedTuple):
    """Keys and values of all layers: float16, and what it leaves as the scheme says, or None; both
    [layers, blocks, 2, KV heads, block size, D].
    """

    high: Tensor
    low: Tensor | None

    def layer(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Both of one layer."""
        return self.high[number], None if self.low is None else self.low[number]


class StepInputs(NamedTuple):
    """What a step computes, int32 on the device.

    tokens, positions, slots, rows: [T]; `rows` are the rows whose logits are made, a negative token is one that the
    last step chose, see `kernels.take_chosen`. tiles: [T, 4], see `kernels.attention`. num_tiles, table_width: [1].
    tables: block ids, [sequences, table_width].
    """

    num_tiles: Tensor
    table_width: Tensor
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    tiles: Tensor
    tables: Tensor


def tile_tokens(config: ModelConfig) -> int:
    """Tokens of an attention program's tile."""
    return max(1, _TILE_ROWS // (config.num_attention_heads // config.num_key_value_heads))


class Llama:
    """Weights, buffers and the forward pass."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        max_model_len: int,
        activation_terms: int,
    ) -> None:
        self.config, self.device, self._tensors = config, device, tensors
        self._activation_terms = activation_terms
        self.layers = [self._layer(f"model.layers.{i}") for i in range(config.num_hidden_layers)]
        self.embedding = self._half("model.embed_tokens.weight")
        self.norm = self._float("model.norm.weight")
        self.head = self._product("model.embed_tokens" if config.tie_word_embeddings else "lm_head")
        del self._tensors
        angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), rope_inv_freq(config))
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)
        self.buffers: dict[str, Tensor] = {}
        self._num_multiprocessors = 132
        if device.type == "cuda":
            self._num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def _float(self, name: str) -> Tensor:
        return self._tensors[name].to(self.device, torch.float32)

    def _half(self, name: str) -> Tensor:
        stored = self._tensors[name].to(self.device)
        half = stored.to(torch.float16)
        if stored.dtype != torch.float16 and not torch.equal(half.to(stored.dtype), stored):
            raise ModelError(
                f"{name} has values that float16 does not hold, and the cuda backend keeps weights in float16; "
                "run this model with --backend torch"
            )
        return half

    def _product(self, *names: str) -> Product:
        """One product of several linears, each padded."""
        halves = [self._half(f"{name}.weight") for name in names]
        rows = [padded(len(half)) if len(names) == 2 else len(half) for half in halves]
        weight = torch.zeros(padded(sum(rows)), padded(halves[0].shape[1]), dtype=torch.float16, device=self.device)
        bias = torch.zeros(len(weight), device=self.device) if f"{names[0]}.bias" in self._tensors else None
        first = 0
        for name, half, count in zip(names, halves, rows, strict=True):
            weight[first : first + len(half), : half.shape[1]] = half
            if bias is not None:
                bias[first : first + len(half)] = self._float(f"{name}.bias")
            first += count
        return Product(weight, bias)

    def _layer(self, prefix: str) -> Layer:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return Layer(
            input_norm=self._float(f"{prefix}.input_layernorm.weight"),
            qkv=self._product(*(f"{attention}.{name}_proj" for name in "qkv")),
            out=self._product(f"{attention}.o_proj"),
            post_norm=self._float(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._product(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=self._product(f"{mlp}.down_proj"),
        )

    def reserve(self, num_rows: int) -> None:
        """Buffers for steps of up to `num_rows` rows, a bucket."""
        self.buffers.clear()
        shapes = buffer_shapes(self.config, num_rows)
        self.buffers = {
            name: torch.zeros(shape, dtype=dtype, device=self.device) for name, (shape, dtype) in shapes.items()
        }

    def launch(self, step: StepInputs, num_rows: int, cache: KVCache) -> None:
        """All kernels of a step of `num_rows` rows, a bucket: fills "final", "logits" and "chosen"."""
        c, buffers = self.config, self.buffers
        parts = buffers["parts"]
        kernels.take_chosen[(triton.cdiv(num_rows, 256),)](step.tokens, buffers["chosen"], num_rows, BLOCK=256)
        bias, num_parts = None, 0
        for i, layer in enumerate(self.layers):
            if i == 0:
                self._add_norm(self.embedding, step.tokens, "embedding", num_rows, 0, None, layer.input_norm)
            else:
                self._add_norm(parts, None, "none", num_rows, num_parts, bias, layer.input_norm)
            self._linear("normed", layer.qkv, "qkv", num_rows)
            self._attention(step, num_rows, layer.qkv.bias, *cache.layer(i))
            self._linear("attended", layer.out, "parts", num_rows, K_SPLITS)
            self._add_norm(parts, None, "none", num_rows, K_SPLITS, layer.out.bias, layer.post_norm)
            self._linear("normed", layer.gate_up, "gate_up", num_rows)
            width = len(layer.gate_up.weight) // 2
            kernels.silu_mul[(num_rows,)](
                buffers["gate_up"], width, layer.gate_up.bias, *self._pair("gated"), buffers["scales"],
                c.intermediate_size, HAS_BIAS=layer.gate_up.bias is not None,
                BLOCK=triton.next_power_of_2(c.intermediate_size), num_warps=16,
            )  # fmt: skip
            self._linear("gated", layer.down, "parts", num_rows, K_SPLITS, scaled=True)
            bias, num_parts = layer.down.bias, K_SPLITS
        self._add_norm(parts, step.rows, "final", num_rows, num_parts, bias, self.norm)
        self.launch_head(num_rows)
        logits = buffers["logits"]
        kernels.argmax[(num_rows,)](logits, logits.shape[1], c.vocab_size, buffers["chosen"], BLOCK=4096, num_warps=8)

    def launch_head(self, num_rows: int) -> None:
        """Logits of the rows in "normed"."""
        self._linear("normed", self.head, "logits", num_rows)

    def split_final(self, num_rows: int) -> None:
        """The rows in "final" as the pair that the head reads."""
        c = self.config
        kernels.split_rows[(num_rows,)](
            self.buffers["final"], *self._pair("normed"), c.hidden_size,
            BLOCK=triton.next_power_of_2(c.hidden_size), num_warps=8,
        )  # fmt: skip

    def _pair(self, name: str) -> tuple[Tensor, int, int]:
        """Address, distance of the low term, and features of a row."""
        pair = self.buffers[name]
        return pair, pair.stride(0), pair.shape[2]

    def _add_norm(
        self, parts: Tensor, index: Tensor | None, kind: str, num_rows: int, num_parts: int, bias: Tensor | None,
        weight: Tensor,
    ) -> None:  # fmt: skip
        c, buffers = self.config, self.buffers
        width = padded(c.hidden_size)
        kernels.add_norm[(num_rows,)](
            buffers["residual"], parts, num_rows * width, width, bias, weight, *self._pair("normed"), index,
            buffers["final"], c.hidden_size, c.rms_norm_eps,
            NUM_PARTS=num_parts, HAS_BIAS=bias is not None, INDEX=kind,
            BLOCK=triton.next_power_of_2(c.hidden_size), num_warps=8,
        )  # fmt: skip

    def _linear(
        self, source: str, product: Product, out: str, num_rows: int, k_splits: int = 1, *, scaled: bool = False
    ) -> None:
        weight, pair, scales = product.weight, self.buffers[source], self.buffers["scales"]
        (out_features, in_features), low_row = weight.shape, pair.shape[1]
        tile = tile_for(num_rows, out_features, k_splits, self._num_multiprocessors)
        grid = (num_rows // tile.block_m) * (out_features // tile.block_n), k_splits
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": BLOCK_K, "K_SPLITS": k_splits}
        how = {
            "SCALED": scaled,
            "TERMS": self._activation_terms,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }
        shape = num_rows, out_features, in_features
        if num_rows <= NARROW_ROWS:
            kernels.linear_narrow[grid](pair, pair.stride(0), scales, weight, self.buffers[out], *shape, **sizes, **how)
            return
        pairs = TensorDescriptor.from_tensor(pair.view(-1, in_features), [tile.block_m, BLOCK_K])
        weights = TensorDescriptor.from_tensor(weight, [tile.block_n, BLOCK_K])
        kernels.linear[grid](pairs, low_row, scales, weights, self.buffers[out], *shape, **sizes, **how)

    def _attention(
        self, step: StepInputs, num_rows: int, bias: Tensor | None, kv_high: Tensor, kv_low: Tensor | None
    ) -> None:
        c, qkv = self.config, self.buffers["qkv"]
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": c.head_dim, "BLOCK_SIZE": BLOCK_SIZE}
        sizes["KV_TERMS"] = 1 if kv_low is None else 2
        queries = self.buffers["queries"]
        kernels.rotate_and_cache[(num_rows, triton.cdiv(heads + 2 * kv_heads, _HEADS_AT_ONCE))](
            qkv, qkv.shape[1], bias, self.cos, self.sin, step.positions, step.slots, queries, queries.stride(0),
            kv_high, kv_low, 1 / math.sqrt(c.head_dim), **sizes, HAS_BIAS=bias is not None,
            BLOCK_HEADS=_HEADS_AT_ONCE, HALF=triton.next_power_of_2(c.head_dim // 2), num_warps=4,
        )  # fmt: skip
        group = heads // kv_heads
        kernels.attention[(num_rows, kv_heads)](
            queries, queries.stride(0), kv_high, kv_low, step.tiles, step.num_tiles, step.tables, step.table_width,
            *self._pair("attended"), **sizes, BLOCK_M=max(_TILE_ROWS, triton.next_power_of_2(group)),
            BLOCK_N=_TILE_KEYS, BLOCK_D=max(16, triton.next_power_of_2(c.head_dim)), num_warps=1, num_stages=3,
        )  # fmt: skip
