"""Packing while reading gives, bit for bit, what packing whole tensors gives; and its size is known before."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isologit.backends.cpu import kernels, packing
from isologit.backends.cpu.packing import PackedWeights, pack, packed_bytes
from isologit.backends.cpu.shortlist import pack_byte_head
from isologit.backends.cpu.simd import BYTE_PRODUCTS
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.config import ModelConfig

# Nothing is a multiple of a panel, and the embedding has more than one block.
ODD = ModelConfig(
    vocab_size=4101,
    hidden_size=300,
    intermediate_size=77,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=1,
    head_dim=20,
)


def held(config: ModelConfig, dtype: str, **changes: torch.Tensor) -> Checkpoint:
    checkpoint = dummy_checkpoint(config, dtype=dtype)
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **changes})


def check_same(weights: PackedWeights, checkpoint: Checkpoint) -> None:
    """Against `pack_weight`, `interleave_gate_up` and `pack_byte_head` of whole tensors."""
    tensors, storage = checkpoint.tensors, checkpoint.config.dtype
    for layer in range(checkpoint.config.num_hidden_layers):

        def get(name: str, prefix: str = f"model.layers.{layer}.") -> torch.Tensor:
            return tensors[f"{prefix}{name}.weight"]

        fused = torch.cat([get(f"self_attn.{name}_proj") for name in "qkv"])
        gate_up = kernels.interleave_gate_up(get("mlp.gate_proj"), get("mlp.up_proj"))
        for ours, whole in (
            (weights.w_qkv, fused),
            (weights.w_out, get("self_attn.o_proj")),
            (weights.w_gate_up, gate_up),
            (weights.w_down, get("mlp.down_proj")),
        ):
            assert np.array_equal(ours[layer], kernels.pack_weight(whole, storage))
        assert np.array_equal(weights.input_norms[layer], get("input_layernorm").float().numpy())
        assert np.array_equal(weights.post_norms[layer], get("post_attention_layernorm").float().numpy())
    assert np.array_equal(weights.final_norm, tensors["model.norm.weight"].float().numpy())
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding if checkpoint.config.tie_word_embeddings else tensors["lm_head.weight"]
    assert np.array_equal(weights.embedding, embedding.float().numpy())
    assert np.array_equal(weights.w_head, kernels.pack_weight(head, storage))
    bytes_ = pack_byte_head(head) if BYTE_PRODUCTS is not None else None
    assert (weights.byte_head is None) == (bytes_ is None)
    if bytes_ is not None and weights.byte_head is not None:
        assert np.array_equal(weights.byte_head.weights, bytes_.weights)
        assert np.array_equal(weights.byte_head.columns, bytes_.columns)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_same_bits_as_whole_tensors(dtype: str, tied: bool) -> None:
    checkpoint = dummy_checkpoint(dataclasses.replace(ODD, tie_word_embeddings=tied), dtype=dtype)
    check_same(pack(checkpoint, num_threads=3), checkpoint)


def test_weights_of_several_types_widen_to_float32() -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    half = dummy_checkpoint(ODD, dtype="float16").tensors[name]
    checkpoint = held(ODD, "float32", **{name: half})
    check_same(pack(checkpoint), checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e13])
def test_heads_without_bounds_have_no_bytes(value: float) -> None:
    head = dummy_checkpoint(ODD).tensors["lm_head.weight"]
    head[4000, 7] = value
    checkpoint = held(ODD, "float32", **{"lm_head.weight": head})
    assert pack_byte_head(head) is None
    assert pack(checkpoint).byte_head is None


def test_packing_hashes_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = held(ODD, "float16")
    expected = checkpoint.sha256()
    again = held(ODD, "float16")
    pack(again)
    monkeypatch.setattr(Checkpoint, "read", lambda *_, **__: pytest.fail("the weights were read twice"))
    assert again.sha256() == expected


def test_size_is_known_before() -> None:
    for config in (ODD, dataclasses.replace(ODD, dtype="float16")):
        weights = pack(dummy_checkpoint(config, dtype=config.dtype))
        assert packed_bytes(config) == len(weights.memory)
        arrays = [value for value in vars(weights).values() if isinstance(value, np.ndarray)]
        if weights.byte_head is not None:
            arrays += [weights.byte_head.weights, weights.byte_head.columns]
        ends = [array.ctypes.data + array.nbytes - weights.memory.ctypes.data for array in arrays]
        assert max(ends) == len(weights.memory)
        assert all(array.ctypes.data % 64 == 0 for array in arrays)


_OTHER_WIDTH = """
import json
import llvmlite.binding as llvm
true_features, features = llvm.get_host_cpu_features, llvm.get_host_cpu_features()
features.update({{"avx512f": False, "avx2": {avx2}, "avxvnni": {vnni}}})
llvm.get_host_cpu_features = lambda: features
import isologit.backends.cpu.simd
llvm.get_host_cpu_features = true_features
from tests.backends.cpu import test_packing
from isologit.common.compiler import VECTOR_WIDTH
for dtype in ("float32", "float16", "bfloat16"):
    checkpoint = test_packing.dummy_checkpoint(test_packing.ODD, dtype=dtype)
    test_packing.check_same(test_packing.pack(checkpoint), checkpoint)
print(json.dumps([VECTOR_WIDTH, test_packing.packing.layout_name(test_packing.ODD)]))
"""


@pytest.mark.parametrize(("avx2", "vnni", "width"), [(True, True, 8), (True, False, 8), (False, False, 4)])
def test_other_vector_widths(avx2: bool, vnni: bool, width: int, tmp_path: Path) -> None:
    """In a process that is told it has narrower vectors than this machine."""
    found = _python(_OTHER_WIDTH.format(avx2=avx2, vnni=vnni), tmp_path)
    assert found[0] == width
    assert f"vectors of {width}, panels of {2 * width}, {'byte-head' if avx2 else 'no-byte-head'}" in found[1]


def _python(code: str, compiled: Path) -> Any:
    root = Path(packing.__file__).parents[4]
    paths = os.pathsep.join([str(root / "src"), str(root)])
    environment = {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(compiled)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout)
