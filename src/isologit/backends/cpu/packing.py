"""Weights in the form the CPU kernels read, all in one piece of memory, and how the blocks of a checkpoint get there.

Where every array lies follows from the config and this machine's vector width alone, so its size is known before
anything is loaded, and the whole can be kept in a file and read back. What the numbers are for is in `step.py`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from isologit.backends.cpu.kernels import pack_rows, panel_count
from isologit.backends.cpu.shortlist import ByteHead, has_byte_bounds, quantised_rows
from isologit.backends.cpu.simd import BYTE_PRODUCTS, PANEL_WIDTH
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.common.compiler import VECTOR_WIDTH
from isologit.common.load_progress import OnLoadProgress
from isologit.config import ModelConfig

LAYOUT_VERSION = 1  # of what lies where within the memory; a kept file of another version is not used
STORED = {"float32": np.float32, "float16": np.int16, "bfloat16": np.uint16}  # what holds the weights' bits
_ALIGNMENT = 4096  # bytes: no two arrays share a page
_HUGE_PAGE = 2 << 20
_QUANTISED_AT_ONCE = 64  # rows of the LM head, to bound the memory that float64 takes


@dataclass(frozen=True)
class _Place:
    """Where an array lies: its first byte, its shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.offset + math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)


@dataclass
class PackedWeights:
    """All weights of a model as the kernels read them: views of `memory`, uint8 [`packed_bytes(config)`].

    w_qkv, w_out, w_gate_up, w_down: [layers, panels, in_features, PANEL_WIDTH] in the stored dtype (float16 as int16
    bits, bfloat16 as uint16), and so is w_head: [panels, hidden, PANEL_WIDTH]. The rest is float32: input_norms and
    post_norms [layers, hidden], final_norm [hidden], embedding [vocab, hidden]. byte_head is None on machines without
    byte products, and for heads without bounds.
    """

    memory: np.ndarray
    w_qkv: np.ndarray
    w_out: np.ndarray
    w_gate_up: np.ndarray
    w_down: np.ndarray
    w_head: np.ndarray
    embedding: np.ndarray
    input_norms: np.ndarray
    post_norms: np.ndarray
    final_norm: np.ndarray
    byte_head: ByteHead | None


def packed_bytes(config: ModelConfig) -> int:
    """Bytes of a model's `PackedWeights` on this machine, exactly. `config.dtype` says how weights are stored.

    Loading needs these, and less than 1 GiB beside them while it goes on.
    """
    return max(place.end for place in _places(config).values())


def layout_name(config: ModelConfig) -> str:
    """What must be equal for packed weights to be usable: everything that decides what lies where, in words."""
    byte_head = "byte-head" if _wants_byte_head(config) else "no-byte-head"
    return f"layout {LAYOUT_VERSION}, {config.dtype}, vectors of {VECTOR_WIDTH}, panels of {PANEL_WIDTH}, {byte_head}"


def allocate(config: ModelConfig) -> np.ndarray:
    """Memory for a model's packed weights, all zero, in huge pages where the system has them: uint8."""
    size = packed_bytes(config)
    pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(pages, np.uint8)
    first = -raw.ctypes.data % _HUGE_PAGE
    return raw[first : first + size]


def view(config: ModelConfig, memory: np.ndarray, *, byte_head: bool) -> PackedWeights:
    """The arrays within the memory. byte_head: whether it holds one that has bounds."""
    arrays = {
        name: memory[place.offset : place.end].view(place.dtype).reshape(place.shape)
        for name, place in _places(config).items()
    }
    weights, columns = arrays.pop("byte_weights", None), arrays.pop("byte_columns", None)
    head = ByteHead(weights, columns) if byte_head and weights is not None and columns is not None else None
    return PackedWeights(memory=memory, byte_head=head, **arrays)


def pack(
    checkpoint: Checkpoint, *, num_threads: int | None = None, on_progress: OnLoadProgress | None = None
) -> PackedWeights:
    """Read the checkpoint once, hash it and pack it, by all cores. Raises ModelError for a file that cannot be read."""
    config = checkpoint.config
    weights = view(config, allocate(config), byte_head=True)
    writers = _writers(config, weights)

    def visit(name: str, first_row: int, block: torch.Tensor) -> None:
        for write in writers.get(name, ()):  # biases are no part of it
            write(first_row, block)

    checkpoint.read(visit, num_threads=num_threads, on_progress=on_progress, doing="packing weights")
    if any(isinstance(w, _ByteRows) and not w.bounded for name in writers for w in writers[name]):
        weights.byte_head = None
    return weights


def _wants_byte_head(config: ModelConfig) -> bool:
    return BYTE_PRODUCTS is not None and has_byte_bounds(config.hidden_size)


def _places(config: ModelConfig) -> dict[str, _Place]:
    """Where each array of `PackedWeights` lies, `byte_weights` and `byte_columns` being those of its byte head."""
    c, stored = config, STORED[config.dtype]
    layers, hidden, vocab = c.num_hidden_layers, c.hidden_size, c.vocab_size
    queries = c.num_attention_heads * c.head_dim
    qkv = queries + 2 * c.num_key_value_heads * c.head_dim
    gate_panels = -(-c.intermediate_size // VECTOR_WIDTH)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "w_qkv": ((layers, panel_count(qkv), hidden, PANEL_WIDTH), stored),
        "w_out": ((layers, panel_count(hidden), queries, PANEL_WIDTH), stored),
        "w_gate_up": ((layers, gate_panels, hidden, PANEL_WIDTH), stored),
        "w_down": ((layers, panel_count(hidden), c.intermediate_size, PANEL_WIDTH), stored),
        "w_head": ((panel_count(vocab), hidden, PANEL_WIDTH), stored),
        "embedding": ((vocab, hidden), np.float32),
        "input_norms": ((layers, hidden), np.float32),
        "post_norms": ((layers, hidden), np.float32),
        "final_norm": ((hidden,), np.float32),
    }
    if _wants_byte_head(config):
        shapes["byte_weights"] = ((panel_count(vocab), hidden // 4, PANEL_WIDTH), np.int32)
        shapes["byte_columns"] = ((panel_count(vocab), 3, PANEL_WIDTH), np.float32)
    places, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        places[name] = _Place(-(-end // _ALIGNMENT) * _ALIGNMENT, shape, dtype)
        end = places[name].end
    return places


Writer = Callable[[int, torch.Tensor], None]  # (first row, block of rows): may be called by any thread


def _writers(config: ModelConfig, weights: PackedWeights) -> Mapping[str, list[Writer]]:
    """By the name of a tensor, what its rows become."""
    c, storage, w = config, config.dtype, weights
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    head: list[Writer] = [_Panels(w.w_head, storage)]
    if w.byte_head is not None:
        head.append(_ByteRows(w.byte_head, c.vocab_size))
    result: dict[str, list[Writer]] = {
        "model.embed_tokens.weight": [_Rows(w.embedding), *(head if c.tie_word_embeddings else [])],
        "model.norm.weight": [_Rows(w.final_norm)],
        "lm_head.weight": head,
    }
    for layer in range(c.num_hidden_layers):
        qkv, gate_up = w.w_qkv[layer], w.w_gate_up[layer]
        named: dict[str, Writer] = {
            "self_attn.q_proj": _Panels(qkv, storage),
            "self_attn.k_proj": _Panels(qkv, storage, first_row=queries),
            "self_attn.v_proj": _Panels(qkv, storage, first_row=queries + keys),
            "self_attn.o_proj": _Panels(w.w_out[layer], storage),
            "mlp.gate_proj": _Panels(gate_up, storage, run=VECTOR_WIDTH),
            "mlp.up_proj": _Panels(gate_up, storage, run=VECTOR_WIDTH, lane=VECTOR_WIDTH),
            "mlp.down_proj": _Panels(w.w_down[layer], storage),
            "input_layernorm": _Rows(w.input_norms[layer]),
            "post_attention_layernorm": _Rows(w.post_norms[layer]),
        }
        result.update({f"model.layers.{layer}.{name}.weight": [writer] for name, writer in named.items()})
    return result


@dataclass(frozen=True)
class _Rows:
    """Rows as they are, in float32."""

    out: np.ndarray

    def __call__(self, first_row: int, block: torch.Tensor) -> None:
        self.out[first_row : first_row + len(block)] = block.float().numpy()


@dataclass(frozen=True)
class _Panels:
    """Rows as columns of panels: `run` rows side by side in a panel, from its column `lane` on.

    out: [panels, in_features, PANEL_WIDTH]. first_row: place of the tensor's first row among those of the panels.
    """

    out: np.ndarray
    storage: str
    first_row: int = 0
    run: int = PANEL_WIDTH
    lane: int = 0

    def __call__(self, first_row: int, block: torch.Tensor) -> None:
        stored = block.to(getattr(torch, self.storage))
        bits = stored.view(torch.int32 if stored.dtype == torch.float32 else torch.int16).numpy()
        pack_rows(bits, self.first_row + first_row, self.run, self.lane, self.out.view(bits.dtype))


class _ByteRows:
    """Rows of the LM head as bytes with bounds. `bounded` turns False when one has none."""

    def __init__(self, out: ByteHead, vocab_size: int) -> None:
        self._out = out
        self.bounded = True
        padding = vocab_size - vocab_size % -PANEL_WIDTH - vocab_size
        if padding:
            out.weights[-1, :, -padding:] = np.full(4, 128, np.uint8).view(np.int32)
            out.columns[-1, 1, -padding:] = -np.inf  # a bound below any logit

    def __call__(self, first_row: int, block: torch.Tensor) -> None:
        for start in range(0, len(block), _QUANTISED_AT_ONCE):
            found = quantised_rows(block[start : start + _QUANTISED_AT_ONCE])
            if found is None:
                self.bounded = False
                return
            bytes_, columns = found
            pack_rows(bytes_.view(np.int32), first_row + start, PANEL_WIDTH, 0, self._out.weights)
            pack_rows(columns.view(np.int32), first_row + start, PANEL_WIDTH, 0, self._out.columns.view(np.int32))
