"""Hugging Face folders against transformers itself, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from isologit.checkpoints.checkpoint import open_checkpoint
from isologit.config import ModelConfig
from isologit.errors import ConfigError, ModelError

TINY = ModelConfig(96, 32, 48, 2, 4, 2, 8)
VARIANTS = {
    "plain": TINY,
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True),
    "biases": dataclasses.replace(TINY, attention_bias=True, mlp_bias=True),
    "float16": dataclasses.replace(TINY, dtype="float16"),
    "bfloat16": dataclasses.replace(TINY, dtype="bfloat16"),
}


def save(config: ModelConfig, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Write a random model as transformers does; returns its weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf_dict())).to(getattr(torch, config.dtype))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **options)
    weights = dict(model.state_dict())
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    save(TINY, folder)
    return folder


@pytest.fixture
def folder(plain_folder: Path, tmp_path: Path) -> Path:
    """A model folder of one's own, to damage."""
    return Path(shutil.copytree(plain_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    weights = load_file(folder / "model.safetensors") | changes
    save_file({name: w for name, w in weights.items() if w is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_same_weights_as_transformers(config: ModelConfig, shard_size: str, tmp_path: Path) -> None:
    weights = save(config, tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "1GB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    assert (checkpoint.kind, checkpoint.source) == ("huggingface", tmp_path)
    assert set(checkpoint.tensors) == set(weights)
    assert len(checkpoint.tensors) == len(weights)
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensors[name], weight)
        assert checkpoint.tensors[name].dtype == weight.dtype


def test_sha256_is_of_the_content(tmp_path: Path) -> None:
    save(TINY, tmp_path / "one")
    save(TINY, tmp_path / "many", max_shard_size="20KB")
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert one.sha256() == many.sha256() == one.sha256()
    edit_weights(tmp_path / "one", {"model.norm.weight": torch.zeros(32)})
    assert open_checkpoint(tmp_path / "one").sha256() != many.sha256()


def test_a_weights_file_can_be_given(folder: Path) -> None:
    other = (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert open_checkpoint(other).sha256() == open_checkpoint(folder).sha256()


def test_config_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    file = (folder / "config.json").rename(tmp_path / "other.json")
    assert open_checkpoint(folder, config=file).config == TINY


def test_generation_config_names_end_tokens(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert open_checkpoint(folder).config.eos_token_ids == (2, 5)


def test_mixed_types_widen_to_float32(folder: Path) -> None:
    edit_weights(folder, {"model.norm.weight": torch.ones(32, dtype=torch.float16)})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.dtype == "float32"
    assert checkpoint.tensors["model.norm.weight"].dtype == torch.float16


def test_stored_rotary_frequencies_are_ignored(folder: Path) -> None:
    edit_weights(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert open_checkpoint(folder).config == TINY


def test_tied_head_stored_twice(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"tie_word_embeddings is true, but lm_head\.weight is stored and differs"):
        open_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    edit_weights(folder, {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert "lm_head.weight" not in open_checkpoint(folder).tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing, though the config asks for it"),
        ({"model.norm.weight": torch.ones(33)}, r"model.norm.weight has shape \[33\], but the config asks for \[32\]"),
        (
            {"model.norm.weight": torch.ones(32).double()},
            "model.norm.weight is stored as F64; save the model in one of",
        ),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, "weights of layer 2, but num_hidden_layers is 2"),
        ({"model.layers.0.mlp.up_proj.bias": torch.ones(1)}, "not expected; set attention_bias or mlp_bias"),
        ({"model.layers.0.mlp.lora_A": torch.ones(1)}, "not part of a LLaMA; merge adapters"),
    ],
)
def test_wrong_weights(folder: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    edit_weights(folder, changes)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(folder)


def test_many_missing_weights_are_counted(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.input_layernorm\.weight, .* and 6 more are missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: is not a complete safetensors file .*; copy it again"):
        open_checkpoint(folder)


def test_shards(tmp_path: Path) -> None:
    save(TINY, tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    kept, text = shards[0].read_bytes(), index.read_text()

    shards[0].unlink()
    with pytest.raises(ModelError, match=f"{shards[0].name}: is missing, though model.safetensors.index.json names it"):
        open_checkpoint(tmp_path)
    shards[0].write_bytes(kept)
    index.write_text('{"weight_map": ["x"]}')
    with pytest.raises(ModelError, match="must map tensor names to file names"):
        open_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(ModelError, match=r"safetensors files but no model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)
    d = json.loads(text)
    d["weight_map"]["again"] = "twice.safetensors"
    index.write_text(json.dumps(d))
    (tmp_path / "twice.safetensors").write_bytes(kept)
    with pytest.raises(ModelError, match=r"twice\.safetensors: holds .*, which model-.* holds too; keep one"):
        open_checkpoint(tmp_path)


def test_no_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r'holds no \.safetensors and no \.ckpt weights; .*load_format "dummy"'):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"holds only PyTorch \.bin or \.pth weights; convert them to safetensors"):
        open_checkpoint(folder)
    with pytest.raises(ModelError, match=r"PyTorch \.bin and \.pth weights are not read; convert them"):
        open_checkpoint(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="is not a checkpoint; give the model's folder"):
        open_checkpoint(folder / "config.json")
    with pytest.raises(ModelError, match=r"nowhere: no such file or folder$"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r'llama2-7b: no such file or folder; .*load_format "dummy"'):
        open_checkpoint("llama2-7b")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json, nor a MindFormers YAML"):
        open_checkpoint(folder)


def test_unknown_qkv_layout(folder: Path) -> None:
    with pytest.raises(ConfigError, match='qkv_layout "qkv" is unknown; use "concat" or "interleaved"'):
        open_checkpoint(folder, qkv_layout="qkv")


def test_query_key_and_value_may_have_biases_alone(tmp_path: Path) -> None:
    weights = save(dataclasses.replace(TINY, attention_bias=True), tmp_path)
    without = {name: weight for name, weight in weights.items() if not name.endswith("o_proj.bias")}
    save_file(without, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert dict(checkpoint.tensors).keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(checkpoint.tensors[name], weight), name
    del without["model.layers.1.self_attn.q_proj.bias"]
    save_file(without, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj\.bias.* missing"):
        open_checkpoint(tmp_path)


def test_a_weight_in_float64_is_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].double()
    save_file(weights, folder / "model.safetensors")
    edit_config(folder, dtype="float64")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as F64; save the model in one of float16"):
        open_checkpoint(folder)
