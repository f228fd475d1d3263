"""Random weights: reproducible, of true shapes, with logits that differ enough to choose from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.checkpoints.stored import dtype_name
from isologit.config import PRESETS, ModelConfig
from isologit.errors import ConfigError
from isologit.text.tokenizer import load_tokenizer

TINY = ModelConfig(96, 32, 48, 2, 4, 2, 8)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_loads_into_transformers(tied: bool, dtype: str) -> None:
    checkpoint = dummy_checkpoint(dataclasses.replace(TINY, tie_word_embeddings=tied), dtype=dtype)
    assert checkpoint.config.dtype == dtype
    assert {dtype_name(tensor.dtype) for tensor in checkpoint.tensors.values()} == {dtype}
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.config.to_hf_dict()))
    result = model.load_state_dict(dict(checkpoint.tensors), strict=False)
    assert result.missing_keys == (["lm_head.weight"] if tied else [])
    assert not result.unexpected_keys


def test_same_seed_same_weights() -> None:
    checkpoint = dummy_checkpoint(TINY)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(checkpoint.tensors[name], checkpoint.tensors[name])
    assert checkpoint.sha256() == dummy_checkpoint(TINY).sha256()
    assert checkpoint.sha256() != dummy_checkpoint(TINY, seed=1).sha256()
    # The numbers themselves are part of the promise: runs on different machines are compared by this hash.
    assert checkpoint.sha256().startswith("bed348efde985ffb")


def test_layers_differ() -> None:
    tensors = dummy_checkpoint(TINY).tensors
    assert not torch.equal(tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"])


def test_spread_of_weights_and_logits() -> None:
    config = dataclasses.replace(PRESETS["llama-110m"], num_hidden_layers=2, vocab_size=4000)
    checkpoint = dummy_checkpoint(config)
    assert checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    assert checkpoint.tensors["model.norm.weight"].mean().item() == pytest.approx(1.0, abs=0.01)
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf_dict())).eval()
    model.load_state_dict(dict(checkpoint.tensors))
    with torch.no_grad():
        logits = model(torch.arange(1, 17)[None]).logits
    assert 2.0 < logits.std().item() < 3.0


def test_unknown_dtype() -> None:
    with pytest.raises(ConfigError, match='dtype "int8" is not supported'):
        dummy_checkpoint(TINY, dtype="int8")


def test_its_source_has_no_tokenizer() -> None:
    assert load_tokenizer(dummy_checkpoint(TINY).source) is None
