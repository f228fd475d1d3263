"""A backend that is one folder and one line of the registry runs the whole engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.backends.toy.backend import ToyBackend
from transformers import LlamaConfig, LlamaForCausalLM

from isologit import LLM, SamplingParams
from isologit.backends.base import LoadOptions
from isologit.backends.registry import BACKENDS
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.config import ModelConfig

CONFIG = ModelConfig(120, 32, 48, 2, 4, 2, 8, 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf_dict()))
    return tmp_path


@pytest.fixture
def toy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setitem(BACKENDS, "toy", "tests.backends.toy.backend:ToyBackend")
    return LLM(folder, load_format="dummy", backend="toy", max_num_seqs=5, speculative_config={})


def test_it_generates_what_the_cpu_backend_generates_and_what_transformers_computes(toy: LLM, folder: Path) -> None:
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 120, 9).tolist()
    prompts = [{"prompt_token_ids": [1, *shared[: 3 * i], *rng.integers(3, 120, 3).tolist()]} for i in range(4)]
    params = SamplingParams(max_tokens=12, return_logits=True, logprobs=2, ignore_eos=True)
    own = toy.generate(prompts, params)
    cpu = LLM(folder, load_format="dummy", backend="cpu").generate(prompts, params)
    assert toy.describe()["backend"] == "toy"
    reference = _transformers(toy)
    for a, b in zip(own, cpu, strict=True):
        assert a.token_ids == b.token_ids
        ids = a.prompt_token_ids + a.token_ids
        with torch.no_grad():
            rows = reference(torch.tensor([ids])).logits[0, len(a.prompt_token_ids) - 1 : -1].numpy()
        assert a.logits is not None
        assert np.abs(a.logits - rows).max() < 1e-4
        assert a.logprobs is not None
        assert b.logprobs is not None
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert x == pytest.approx(y, abs=1e-4)


def _transformers(llm: LLM) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf_dict(), attn_implementation="eager"))
    model.load_state_dict(dict(llm.checkpoint.tensors), strict=not CONFIG.tie_word_embeddings)
    return model.eval()


def test_its_memory_is_planned() -> None:
    options = LoadOptions(max_model_len=64, num_threads=1)
    backend = ToyBackend.load(dummy_checkpoint(CONFIG), options)
    backend.allocate_kv(3)
    assert backend.memory() == ToyBackend.plan_memory(CONFIG, options, 8)
