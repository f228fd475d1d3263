"""MindFormers' names for LLaMA weights, as tables, and one loader that follows them. Knows no file format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from isologit.checkpoints.stored import EMBEDDING, HEAD, StoredTensor
from isologit.config import ModelConfig
from isologit.errors import ConfigError, ModelError

QKV_LAYOUTS = ("concat", "interleaved")

_MODEL_NAMES = {
    "model.tok_embeddings.embedding_weight": EMBEDDING,
    "model.norm_out.weight": "model.norm.weight",
    "lm_head.weight": HEAD,
}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_FUSED_NAMES = {
    "attention.w": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.w_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.w_gate_hidden": ("mlp.gate_proj", "mlp.up_proj"),
}
# What training and inference leave beside the weights: KV caches, optimizer state, counters.
_IGNORED = re.compile(
    r".*\.paged_attention_mgr\..*|adam_[mv]\..*|epoch_num|step_num|global_step|loss_scale|scale_sense"
    r"|current_iterator_step|last_overflow_iterator_step"
)
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)\.(weight|bias)")


@dataclass(frozen=True)
class _Slice:
    """Rows of a fused matrix that belong to one of its parts: `start` to `stop` of each of `groups` equal groups."""

    groups: int
    start: int
    stop: int


def is_mindformers(names: Iterable[str]) -> bool:
    """Whether tensors go by MindFormers' names."""
    return any(name.endswith("tok_embeddings.embedding_weight") for name in names)


def to_huggingface(
    stored: Mapping[str, StoredTensor], config: ModelConfig, source: Path, *, qkv_layout: str | None
) -> dict[str, StoredTensor]:
    """The same tensors by Hugging Face's names, fused matrices split; names in no table are kept as they are.

    `qkv_layout` says how the rows of fused matrices are ordered: "concat" is [q; k; v] and [gate; up], "interleaved"
    is (queries, key, value) for each key-value head and (gate, up) for each row. Raises ModelError when the file has
    fused matrices and no layout is given, or when a fused matrix does not have the rows the config asks for.
    """
    result: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if _IGNORED.fullmatch(name):
            continue
        match = _LAYER.fullmatch(name)
        if name in _MODEL_NAMES:
            result[_MODEL_NAMES[name]] = tensor
        elif match and match[2] in _LAYER_NAMES:
            result[f"{match[1]}{_LAYER_NAMES[match[2]]}.{match[3]}"] = tensor
        elif match and match[2] in _FUSED_NAMES:
            if qkv_layout is None:
                raise ModelError(
                    f"{source}: {name} is a fused matrix whose row order the file does not tell; set qkv_layout to "
                    '"concat" ([q; k; v] and [w1; w3]; MindFormers before 1.6) or "interleaved" (per key-value head, '
                    "w1 and w3 row by row; MindFormers 1.6 and later)"
                )
            parts = _split(name, tensor, _FUSED_NAMES[match[2]], config, qkv_layout)
            result.update({f"{match[1]}{part}.{match[3]}": piece for part, piece in parts.items()})
        else:
            result[name] = tensor
    return result


def check_qkv_layout(qkv_layout: str | None) -> None:
    """Raise ConfigError for a layout that does not exist."""
    if qkv_layout not in (None, *QKV_LAYOUTS):
        raise ConfigError(f'qkv_layout "{qkv_layout}" is unknown; use "concat" or "interleaved"')


def _split(
    name: str, tensor: StoredTensor, parts: tuple[str, ...], config: ModelConfig, qkv_layout: str
) -> dict[str, StoredTensor]:
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    is_qkv = len(parts) == 3
    rows = (query, key, key) if is_qkv else (config.intermediate_size, config.intermediate_size)
    if not tensor.shape or tensor.shape[0] != sum(rows):
        raise ModelError(
            f"{tensor.file}: {name} has shape {list(tensor.shape)}, but the config asks for {sum(rows)} rows; "
            "the config is another model's"
        )
    groups = 1
    if qkv_layout == "interleaved":
        groups = config.num_key_value_heads if is_qkv else config.intermediate_size
    result, start = {}, 0
    for part, count in zip(parts, rows, strict=True):
        piece = _Slice(groups, start, start + count // groups)
        shape = (count, *tensor.shape[1:])
        result[part] = StoredTensor(shape, tensor.dtype, tensor.file, partial(_read_slice, tensor, piece))
        start = piece.stop
    return result


def _read_slice(tensor: StoredTensor, piece: _Slice, first_row: int, out: np.ndarray) -> None:
    """Some rows of a part: what lies between them in the fused matrix is read with them."""
    group_rows, own_rows = tensor.num_rows // piece.groups, piece.stop - piece.start
    if piece.groups == 1:
        tensor.read(piece.start + first_row, out)
        return
    first_group, last_group = first_row // own_rows, -(-(first_row + len(out)) // own_rows)
    fused = np.empty(((last_group - first_group) * group_rows, out.shape[1]), np.uint8)
    tensor.read(first_group * group_rows, fused)
    own = fused.reshape(-1, group_rows, out.shape[1])[:, piece.start : piece.stop].reshape(-1, out.shape[1])
    out[:] = own[first_row - first_group * own_rows :][: len(out)]
