"""Prompts into requests, for models with a tokenizer and without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from isologit.config import EngineOptions
from isologit.errors import DatasetError
from isologit.job.options import RunOptions
from isologit.job.preprocess import preprocess
from isologit.job.preview import UnloadedModel

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 1024, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    """Random weights, which have no tokenizer."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPE))
    return RunOptions(engine=EngineOptions(model=str(config), load_format="dummy"), limit=5)


def test_a_model_without_a_tokenizer_gets_the_built_in_prompts_as_the_demo_models_tokens(options: RunOptions) -> None:
    demo = RunOptions(limit=5)
    prepared = preprocess(options, UnloadedModel(options))
    assert prepared.refused == []
    assert prepared.sha256() == preprocess(demo, UnloadedModel(demo)).sha256()


def test_text_for_random_weights_is_the_demo_models_tokens(options: RunOptions, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Describe the fox.\n")
    asked, demo = replace(options, dataset=file), RunOptions(dataset=file, limit=5)
    prepared = preprocess(asked, UnloadedModel(options))
    assert prepared.sha256() == preprocess(demo, UnloadedModel(demo)).sha256()


def test_text_for_trained_weights_needs_their_tokenizer(options: RunOptions, tmp_path: Path) -> None:
    """Another tokenizer's ids would mean something else to a model that knows text."""
    file = tmp_path / "prompts.txt"
    file.write_text("Describe the fox.\n")
    trained = replace(options, dataset=file, engine=replace(options.engine, load_format="auto"))
    with pytest.raises(DatasetError, match="name one with --tokenizer"):
        preprocess(trained, UnloadedModel(options))
