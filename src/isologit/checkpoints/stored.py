"""Stored weights before anyone reads them: name, shape, type and a way to read. Owns the check against a config."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from isologit.common.workers import share
from isologit.config import ModelConfig
from isologit.errors import ModelError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
WEIGHT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}
_PIECE_BYTES = 4 << 20  # of a tensor that is loaded by several threads
_OUTPUT_BIAS, _QUERY_BIAS = "self_attn.o_proj.bias", "self_attn.q_proj.bias"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


# `read(first_row, out)` fills `out`, uint8 [rows, bytes of a row], with the rows from `first_row` on: little-endian, in
# the stored dtype. Any thread may call it. Raises ModelError when the file cannot be read.
ReadRows = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `dtype` is the file format's own word when it is not one of `WEIGHT_DTYPES`.

    read: gives some of its rows, which of a vector are the elements. mapped: the tensor over the mapped file, where
    that needs no copy. digest: of the values (`hashing`), where it is known without reading them.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: ReadRows
    mapped: Callable[[], torch.Tensor] | None = None
    digest: str | None = None

    @property
    def num_rows(self) -> int:
        """1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row. `dtype` must be one of `WEIGHT_DTYPES`."""
        return math.prod(self.shape[1:]) * WEIGHT_DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.num_rows * self.row_bytes

    def load(self) -> torch.Tensor:
        """The whole tensor; in memory of its own, read by all cores, unless it can be had over the mapped file."""
        if self.mapped is not None:
            return self.mapped()
        tensor = torch.empty(self.shape, dtype=WEIGHT_DTYPES[self.dtype])
        rows = tensor.view(-1).view(torch.uint8).numpy().reshape(self.num_rows, -1)
        step = max(1, _PIECE_BYTES // max(1, self.row_bytes))
        firsts = range(0, self.num_rows, step)
        if len(firsts) == 1:
            self.read(0, rows)
        else:
            threads = min(len(os.sched_getaffinity(0)), len(firsts))
            share(firsts, lambda first: self.read(first, rows[first : first + step]), num_threads=threads)
        return tensor


def in_memory(tensors: Mapping[str, torch.Tensor], file: Path) -> dict[str, StoredTensor]:
    """Tensors that are in memory already, as if they were stored in `file`."""
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return {
        name: StoredTensor(tuple(t.shape), dtype_name(t.dtype), file, partial(_copy_rows, t))
        for name, t in held.items()
    }


def _copy_rows(tensor: torch.Tensor, first_row: int, out: np.ndarray) -> None:
    out[:] = tensor.view(-1).view(torch.uint8).numpy().reshape(-1, out.shape[1])[first_row : first_row + len(out)]


class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors by name; each access loads from the file (or generates) anew, so nothing is held twice."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.stored[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def dtype_name(dtype: torch.dtype) -> str:
    """The name a config uses: "float16", "bfloat16" or "float32"."""
    return _DTYPE_NAMES[dtype]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a LLaMA's weights in Hugging Face's convention; linear weights are [out, in]."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (query, hidden, config.attention_bias),
        "self_attn.k_proj": (key, hidden, config.attention_bias),
        "self_attn.v_proj": (key, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, query, config.attention_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def checked_tensors(stored: Mapping[str, StoredTensor], config: ModelConfig, source: Path) -> dict[str, StoredTensor]:
    """Exactly the weights `config` asks for, in their canonical order, out of tensors by Hugging Face names.

    Rotary frequencies that old files store are ignored. Raises ModelError when a weight is missing, has another shape
    or type, or is not one of a LLaMA's.
    """
    left = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    shapes = expected_shapes(config)
    left |= _absent_output_biases(left, shapes, source)
    if missing := [name for name in shapes if name not in left]:
        raise ModelError(
            f"{source}: {_some(missing)} missing, though the config asks for it; "
            "the checkpoint is incomplete or the config is another model's"
        )
    chosen = {name: left.pop(name) for name in shapes}
    for name, tensor in chosen.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ModelError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}; "
                f"save the model in one of {', '.join(WEIGHT_DTYPES)}"
            )
        if tensor.shape != shapes[name]:
            raise ModelError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, but the config asks for {list(shapes[name])}; "
                "the config is another model's"
            )
    if config.tie_word_embeddings and HEAD in left:
        _check_tied(left.pop(HEAD), chosen[EMBEDDING], source)
    if left:
        _refuse_extra(list(left), config, source)
    return chosen


def _absent_output_biases(
    stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], source: Path
) -> dict[str, StoredTensor]:
    """Zeros for the biases of `o_proj`, where q, k and v have stored biases and no `o_proj` has (Qwen's way).

    transformers starts what a checkpoint lacks from zero too.
    """
    wanted = [name for name in shapes if name.endswith(_OUTPUT_BIAS)]
    if any(name in stored for name in wanted):
        return {}
    beside = {name: stored.get(name.replace(_OUTPUT_BIAS, _QUERY_BIAS)) for name in wanted}
    zeros = {
        name: torch.zeros(shapes[name], dtype=WEIGHT_DTYPES[query.dtype])
        for name, query in beside.items()
        if query is not None and query.dtype in WEIGHT_DTYPES
    }
    return in_memory(zeros, source)


def stored_dtype(stored: Mapping[str, StoredTensor]) -> str:
    """The type all weights share, or "float32", which holds every value exactly, when they are mixed."""
    dtypes = {tensor.dtype for tensor in stored.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _check_tied(head: StoredTensor, embedding: StoredTensor, source: Path) -> None:
    if head.shape != embedding.shape or not _same_values(head, embedding):
        raise ModelError(
            f"{source}: tie_word_embeddings is true, but {HEAD} is stored and differs from {EMBEDDING}; "
            "set tie_word_embeddings to false in the config"
        )


def _same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Compared a few rows at a time: neither tensor need fit in memory."""
    if not a.dtype == b.dtype in WEIGHT_DTYPES:
        return False
    step = max(1, _PIECE_BYTES // max(1, a.row_bytes))
    for first in range(0, a.num_rows, step):
        ours = np.empty((min(step, a.num_rows - first), a.row_bytes), np.uint8)
        theirs = np.empty_like(ours)
        a.read(first, ours)
        b.read(first, theirs)
        if not np.array_equal(ours, theirs):
            return False
    return True


def _refuse_extra(names: list[str], config: ModelConfig, source: Path) -> None:
    beyond = [int(m[1]) for name in names if (m := _LAYER.match(name)) and int(m[1]) >= config.num_hidden_layers]
    if beyond:
        raise ModelError(
            f"{source}: holds weights of layer {max(beyond)}, but num_hidden_layers is {config.num_hidden_layers}; "
            "the config is another model's"
        )
    if any(name.endswith(".bias") for name in names):
        raise ModelError(
            f"{source}: {_some(names)} not expected; set attention_bias or mlp_bias in the config "
            "if the model has biases"
        )
    raise ModelError(
        f"{source}: {_some(names)} not part of a LLaMA; merge adapters and undo quantization before loading"
    )


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{', '.join(names[:3])}{'' if len(names) <= 3 else f' and {len(names) - 3} more'} are"
