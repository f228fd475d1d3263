"""Writes MindSpore `.ckpt` files as MindSpore does, for tests: the reader's counterpart, built from the same notes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from isologit.config import ModelConfig

_TYPE_NAMES = {
    torch.float16: "Float16",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float32",
    torch.float64: "Float64",
    torch.int32: "Int32",
}


def write_mindspore_ckpt(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    part_bytes: int = 512 << 20,
    crc: bool = False,
    packed_dims: bool = False,
    scalar_dims: tuple[int, ...] = (),
) -> None:
    """One `Value` a part of at most `part_bytes`; `scalar_dims` are the dims written for tensors without any."""
    checksum = 0
    with file.open("wb") as out:
        for name, tensor in tensors.items():
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            dims = tuple(tensor.shape) or scalar_dims
            for start in range(0, max(len(data), 1), part_bytes):
                message = value_message(
                    name, dims, _TYPE_NAMES[tensor.dtype], data[start : start + part_bytes], packed_dims
                )
                checksum = zlib.crc32(message, checksum)
                out.write(message)
        if crc:
            out.write(b"crc_num" + checksum.to_bytes(10, "big"))


def value_message(name: str, dims: tuple[int, ...], type_name: str, data: bytes, packed_dims: bool = False) -> bytes:
    """One `Checkpoint` message that holds one `Value`."""
    if packed_dims:
        wire_dims = bytes_field(1, b"".join(varint(d) for d in dims))
    else:
        wire_dims = b"".join(varint(1 << 3) + varint(d) for d in dims)
    tensor = wire_dims + bytes_field(2, type_name.encode()) + bytes_field(3, data)
    return bytes_field(1, bytes_field(1, name.encode()) + bytes_field(2, tensor))


def bytes_field(number: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def mindformers_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's weights under MindFormers' names, by the replacements of MindFormers' own converter."""
    replacements = [
        ("embed_tokens.weight", "tok_embeddings.embedding_weight"),
        (".self_attn.q_proj.", ".attention.wq."),
        (".self_attn.k_proj.", ".attention.wk."),
        (".self_attn.v_proj.", ".attention.wv."),
        (".self_attn.o_proj.", ".attention.wo."),
        (".mlp.gate_proj.", ".feed_forward.w1."),
        (".mlp.down_proj.", ".feed_forward.w2."),
        (".mlp.up_proj.", ".feed_forward.w3."),
        (".input_layernorm.", ".attention_norm."),
        (".post_attention_layernorm.", ".ffn_norm."),
        (".norm.", ".norm_out."),
    ]
    result = {}
    for name, weight in weights.items():
        for old, new in replacements:
            name = name.replace(old, new)
        result[name] = weight
    return result


def fused(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, layout: str, qkv_name: str = "w_qkv"
) -> dict[str, torch.Tensor]:
    """MindFormers' weights with the matrices fused, row by row as each layout's definition says."""
    result = dict(weights)
    for layer in range(config.num_hidden_layers):
        attention, feed_forward = f"model.layers.{layer}.attention", f"model.layers.{layer}.feed_forward"
        for kind in ("weight", "bias"):
            if f"{attention}.wq.{kind}" in result:
                q, k, v = (result.pop(f"{attention}.{name}.{kind}") for name in ("wq", "wk", "wv"))
                result[f"{attention}.{qkv_name}.{kind}"] = _fuse_qkv(q, k, v, config, layout)
            if f"{feed_forward}.w1.{kind}" in result:
                gate, up = (result.pop(f"{feed_forward}.{name}.{kind}") for name in ("w1", "w3"))
                rows = [row for pair in zip(gate, up, strict=True) for row in pair]
                both = torch.stack(rows) if layout == "interleaved" else torch.cat([gate, up])
                result[f"{feed_forward}.w_gate_hidden.{kind}"] = both
    return result


def _fuse_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: ModelConfig, layout: str) -> torch.Tensor:
    if layout == "concat":
        return torch.cat([q, k, v])
    pieces, size = [], config.head_dim
    queries = size * config.num_attention_heads // config.num_key_value_heads
    for head in range(config.num_key_value_heads):
        pieces.append(q[head * queries : (head + 1) * queries])
        pieces.append(k[head * size : (head + 1) * size])
        pieces.append(v[head * size : (head + 1) * size])
    return torch.cat(pieces)
