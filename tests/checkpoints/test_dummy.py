"""Random weights: reproducible, of true shapes, with logits that differ enough to choose from."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from isologit.checkpoints import random_numbers
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
    # The numbers themselves are part of the promise: runs on different machines are compared by these hashes.
    assert checkpoint.sha256().startswith("0521515bccb61e78")


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [("float32", "344e4f4702212068"), ("float16", "a12164f8b1a4d3b6"), ("bfloat16", "4e1745175f59424e")],
)
def test_the_numbers_are_these_on_every_machine(dtype: str, digest: str) -> None:
    numbers = dummy_checkpoint(TINY, seed=7, dtype=dtype).tensors["model.embed_tokens.weight"]
    assert hashlib.sha256(numbers.view(torch.uint8).numpy().tobytes()).hexdigest().startswith(digest)


def test_the_numbers_are_what_their_definition_says() -> None:
    """In Python's own integers, and rounded to float32 once where the mean is zero."""
    key = int.from_bytes(hashlib.sha256(b"7:model.embed_tokens.weight").digest()[:8], "little")
    numbers = dummy_checkpoint(TINY, seed=7).tensors["model.embed_tokens.weight"].view(-1)
    factor = np.float32(0.02 / math.sqrt((2**32 - 1) / 3))
    for place in (0, 1, 1000, len(numbers) - 1):
        word = (key + place * 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        word ^= word >> 31
        total = sum(word >> shift & 0xFFFF for shift in (0, 16, 32, 48))
        assert numbers[place].item() == float(np.float32(total - 131070) * factor)


def test_every_dtype_has_the_same_numbers() -> None:
    wide = dummy_checkpoint(TINY).tensors
    for dtype in (torch.float16, torch.bfloat16):
        for name, tensor in dummy_checkpoint(TINY, dtype=dtype_name(dtype)).tensors.items():
            assert torch.equal(tensor, wide[name].to(dtype))


def test_the_hash_is_known_without_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise AssertionError("numbers were made")

    monkeypatch.setattr(random_numbers, "fill", fill)
    checkpoint = dummy_checkpoint(PRESETS["llama2-7b"], dtype="float16")
    other = dataclasses.replace(PRESETS["llama2-7b"], intermediate_size=11009)
    hashes = {
        checkpoint.sha256(),
        dummy_checkpoint(PRESETS["llama2-7b"], dtype="bfloat16").sha256(),
        dummy_checkpoint(PRESETS["llama2-7b"], seed=1, dtype="float16").sha256(),
        dummy_checkpoint(other, dtype="float16").sha256(),
    }
    assert len(hashes) == 4
    with pytest.raises(AssertionError, match="numbers were made"):
        checkpoint.read(lambda *_: None)


def test_any_thread_can_begin_anywhere() -> None:
    """A block of rows has the numbers that it has within the whole, however the whole is cut."""
    stored = dummy_checkpoint(dataclasses.replace(TINY, vocab_size=4099), dtype="float16").tensors.stored
    tensor = stored["lm_head.weight"]
    whole = tensor.load().view(torch.uint8).numpy()
    for first, last in ((0, 1), (1, 4000), (4098, 4099)):
        out = np.empty((last - first, tensor.row_bytes), np.uint8)
        tensor.read(first, out)
        assert np.array_equal(out, whole[first:last])


def test_rounding_is_that_of_torch() -> None:
    values = torch.randn(1 << 16) * torch.logspace(-9, 4, 1 << 16)
    values = torch.cat([values, torch.tensor([0.0, -0.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 65503.0])])
    bits, out = values.numpy().view(np.uint32), np.empty(len(values), np.uint16)
    random_numbers.round_to_float16(bits, out)
    assert np.array_equal(out, values.half().view(torch.uint16).numpy())
    random_numbers.round_to_bfloat16(bits, out)
    assert np.array_equal(out, values.bfloat16().view(torch.uint16).numpy())


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
