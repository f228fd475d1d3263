"""A backend in plain NumPy, as small as the seam allows: what docs/backends.md asks for, and nothing else."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from isologit.backends.base import Backend, LoadOptions, Memory
from isologit.backends.batch import FlatBatch, ReadyOutput, StepOutput
from isologit.backends.rope import rope_inv_freq
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.config import ModelConfig
from isologit.errors import ModelError


class ToyBackend:
    """Everything in float32, one sequence at a time."""

    name: ClassVar[str] = "toy"
    overlaps_steps: ClassVar[bool] = False
    block_size = 4
    numerics: ClassVar[tuple[str, ...]] = ("float32",)

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self.config = c = checkpoint.config
        self.weights = {name: tensor.float().numpy() for name, tensor in checkpoint.tensors.items()}
        self.head = self.weights["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
        angles = torch.outer(torch.arange(options.max_model_len).float(), rope_inv_freq(c))
        self.cos, self.sin = angles.cos().numpy(), angles.sin().numpy()  # [positions, head_dim / 2]
        self.kv = self._empty_kv(0)

    @classmethod
    def why_not(cls, device: str) -> str | None:
        return None if device in ("auto", "cpu") else "it runs on the CPU only"

    @classmethod
    def load(cls, checkpoint: Checkpoint, options: LoadOptions) -> Backend:
        if checkpoint.config.attention_bias or checkpoint.config.mlp_bias:
            raise ModelError("the toy backend does not compute models with biases")
        return cls(checkpoint, options)

    @classmethod
    def plan_memory(cls, config: ModelConfig, options: LoadOptions, num_tokens: int) -> Memory:
        weights = 4 * config.num_parameters
        return Memory(weights, _kv_block_bytes(config, cls.block_size), step_buffers=0)

    @classmethod
    def own_memory(cls, device: str) -> int | None:
        return None

    @classmethod
    def product_rate(cls, num_threads: int) -> float | None:
        return None

    def _empty_kv(self, num_blocks: int) -> np.ndarray:
        c = self.config
        slots = num_blocks * self.block_size
        return np.zeros((c.num_hidden_layers, 2, slots, c.num_key_value_heads, c.head_dim), np.float32)

    def allocate_kv(self, num_blocks: int) -> None:
        self.kv = self._empty_kv(num_blocks)

    def reserve(self, num_tokens: int) -> None:
        pass

    def forward(self, batch: FlatBatch) -> StepOutput:
        eps = self.config.rms_norm_eps
        x = self.weights["model.embed_tokens.weight"][batch.token_ids]  # [T, hidden]
        for layer in range(self.config.num_hidden_layers):
            weight = {name: self.weights[f"model.layers.{layer}.{name}.weight"] for name in _LAYER}
            normed = _norm(x, weight["input_layernorm"], eps)
            x = x + self._attention(layer, normed, weight, batch) @ weight["self_attn.o_proj"].T
            normed = _norm(x, weight["post_attention_layernorm"], eps)
            gate, up = normed @ weight["mlp.gate_proj"].T, normed @ weight["mlp.up_proj"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ weight["mlp.down_proj"].T
        final = _norm(x[batch.logits_rows], self.weights["model.norm.weight"], eps)  # [R, hidden]
        logits = self.project(final)
        return ReadyOutput(logits.argmax(1), final, logits[batch.logits_wanted])

    def _attention(self, layer: int, normed: np.ndarray, weight: dict[str, np.ndarray], batch: FlatBatch) -> np.ndarray:
        """[T, hidden] -> [T, heads * head_dim]; the tokens' keys and values are written before any attends."""
        c, rows = self.config, len(normed)
        q, k, v = (
            (normed @ weight[f"self_attn.{name}_proj"].T).reshape(rows, -1, c.head_dim) for name in "qkv"
        )  # [T, heads, head_dim]
        self.kv[layer, 0, batch.slots] = self._rotated(k, batch.positions)
        self.kv[layer, 1, batch.slots] = v
        q = self._rotated(q, batch.positions)
        out = np.empty_like(q)
        for (first, count, start), table_row in zip(batch.sequences, batch.table_rows, strict=True):
            context = np.arange(start + count)
            slots = batch.block_tables[table_row, context // self.block_size] * self.block_size
            keys, values = self.kv[layer][:, slots + context % self.block_size].repeat(
                c.num_attention_heads // c.num_key_value_heads, axis=2
            )  # [context, heads, head_dim] each
            own = slice(first, first + count)
            scores = np.einsum("thd,chd->htc", q[own], keys) / np.float32(np.sqrt(c.head_dim))
            scores[:, context[None] > start + np.arange(count)[:, None]] = -np.inf
            scores = np.exp(scores - scores.max(2, keepdims=True))
            out[own] = np.einsum("htc,chd->thd", scores / scores.sum(2, keepdims=True), values)
        return out.reshape(rows, -1)

    def _rotated(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rotary embedding of [T, heads, head_dim]."""
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        a, b = np.split(x, 2, axis=2)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)

    def project(self, final: np.ndarray) -> np.ndarray:
        logits: np.ndarray = final @ self.head.T
        return logits

    def log_normalisers(self, output: StepOutput) -> np.ndarray:
        logits = output.logits.astype(np.float64)
        top = logits.max(1, keepdims=True)
        normalisers: np.ndarray = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
        return normalisers

    def memory(self) -> Memory:
        weights = sum(weight.nbytes for weight in self.weights.values())
        return Memory(weights, _kv_block_bytes(self.config, self.block_size), step_buffers=0)

    def free_memory(self) -> int:
        return 1 << 26

    def describe(self) -> dict[str, Any]:
        weights = self.memory().weights
        return {
            "device": "cpu",
            "kernels": "numpy",
            "compute_dtype": "float32",
            "weights_dtype": "float32",
            "weight_bytes": weights,
            "step_bytes": weights,
        }

    def reset_phases(self) -> None:
        pass

    def phases(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.kv = self._empty_kv(0)


_LAYER = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def _kv_block_bytes(config: ModelConfig, block_size: int) -> int:
    return 4 * config.num_hidden_layers * 2 * block_size * config.num_key_value_heads * config.head_dim


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMS norm of the rows of [T, hidden]."""
    normed: np.ndarray = x / np.sqrt((x * x).mean(1, keepdims=True) + np.float32(eps)) * weight
    return normed
