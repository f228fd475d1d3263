"""MindFormers checkpoints give the very tensors of the Hugging Face model they were made from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tests.checkpoints.mindspore_writer import fused, mindformers_names, write_mindspore_ckpt

from isologit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from isologit.checkpoints.config_files import read_config
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.config import ModelConfig, RopeScaling
from isologit.errors import ModelError

TINY = ModelConfig(96, 32, 48, 2, 4, 2, 8, rms_norm_eps=1e-5, pad_token_id=0)


def held(config: ModelConfig, dtype: str = "float32") -> Checkpoint:
    """Random weights in memory, so that their hash is that of their values, as a file's is."""
    checkpoint = dummy_checkpoint(config, dtype=dtype)
    return dataclasses.replace(checkpoint, tensors=dict(checkpoint.tensors))


REFERENCE = held(TINY)
WEIGHTS = mindformers_names(REFERENCE.tensors)
SECTION: dict[str, Any] = {
    "type": "LlamaConfig",
    "seq_length": 2048,
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "n_kv_heads": 2,
    "rms_norm_eps": 1.0e-5,
    "extend_method": "None",
    "scaling_factor": 1.0,
    "compute_dtype": "float16",
}


def write_yaml(folder: Path, name: str = "predict.yaml", **changes: Any) -> None:
    section = {key: value for key, value in (SECTION | changes).items() if value is not ...}
    (folder / name).write_text(yaml.safe_dump({"seed": 0, "model": {"model_config": section}}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A MindFormers folder: a plain checkpoint and its YAML."""
    write_mindspore_ckpt(tmp_path / "llama.ckpt", WEIGHTS)
    write_yaml(tmp_path)
    return tmp_path


def test_names_of_a_plain_checkpoint() -> None:
    assert "model.tok_embeddings.embedding_weight" in WEIGHTS
    assert "model.norm_out.weight" in WEIGHTS
    assert "model.layers.1.feed_forward.w3.weight" in WEIGHTS
    assert not any("proj" in name or "layernorm" in name for name in WEIGHTS)


@pytest.mark.parametrize("target", [".", "llama.ckpt"])
def test_same_tensors_as_hugging_face(folder: Path, target: str) -> None:
    checkpoint = open_checkpoint(folder / target)
    assert (checkpoint.kind, checkpoint.source) == ("mindformers", folder / target)
    assert checkpoint.config == TINY
    assert checkpoint.sha256() == REFERENCE.sha256()


@pytest.mark.parametrize("layout", ["concat", "interleaved"])
@pytest.mark.parametrize("qkv_name", ["w", "w_qkv"])
@pytest.mark.parametrize("biases", [False, True])
def test_fused_matrices(tmp_path: Path, layout: str, qkv_name: str, biases: bool) -> None:
    config = dataclasses.replace(TINY, attention_bias=biases, mlp_bias=biases)
    reference = held(config, "bfloat16")
    weights = fused(mindformers_names(reference.tensors), config, layout, qkv_name)
    assert f"model.layers.0.attention.{qkv_name}.weight" in weights
    assert "model.layers.0.attention.wq.weight" not in weights
    write_mindspore_ckpt(tmp_path / "x.ckpt", weights, part_bytes=1000)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict()))
    assert open_checkpoint(tmp_path, qkv_layout=layout).sha256() == reference.sha256()
    other = "concat" if layout == "interleaved" else "interleaved"
    assert open_checkpoint(tmp_path, qkv_layout=other).sha256() != reference.sha256()


def test_fused_matrices_need_a_layout(folder: Path) -> None:
    write_mindspore_ckpt(folder / "llama.ckpt", fused(WEIGHTS, TINY, "concat"))
    with pytest.raises(ModelError, match=r'w_qkv\.weight is a fused matrix .* set qkv_layout to "concat" .* or "inter'):
        open_checkpoint(folder)


def test_fused_matrix_of_another_size(folder: Path) -> None:
    write_mindspore_ckpt(folder / "llama.ckpt", fused(WEIGHTS, TINY, "concat"))
    write_yaml(folder, n_kv_heads=4)
    with pytest.raises(ModelError, match=r"w_qkv\.weight has shape \[64, 32\], but the config asks for 96 rows"):
        open_checkpoint(folder, qkv_layout="concat")


def test_what_is_not_a_weight_is_ignored(folder: Path) -> None:
    extra = {
        "model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache": torch.zeros(4, 2, 2, 8),
        "model.layers.1.attention.infer_attention.paged_attention_mgr.value_cache": torch.zeros(4, 2, 2, 8),
        "adam_m.model.norm_out.weight": torch.zeros(32),
        "epoch_num": torch.tensor(3, dtype=torch.int32),
    }
    write_mindspore_ckpt(folder / "llama.ckpt", WEIGHTS | extra)
    assert open_checkpoint(folder).sha256() == REFERENCE.sha256()


def test_adapters_are_refused(folder: Path) -> None:
    name = "model.layers.0.attention.wq.mindpet_delta_lora_a"
    write_mindspore_ckpt(folder / "llama.ckpt", WEIGHTS | {name: torch.zeros(2, 32)})
    with pytest.raises(ModelError, match="mindpet_delta_lora_a is not part of a LLaMA; merge adapters"):
        open_checkpoint(folder)


def test_tied_head(folder: Path) -> None:
    config = dataclasses.replace(TINY, tie_word_embeddings=True)
    reference = held(config)
    write_mindspore_ckpt(folder / "llama.ckpt", mindformers_names(reference.tensors))
    write_yaml(folder, tie_word_embeddings=True)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == config
    assert "lm_head.weight" not in checkpoint.tensors


def test_shards_of_mindspore(folder: Path) -> None:
    names = list(WEIGHTS)
    shards = {"m-00001-of-00002.ckpt": names[:9], "m-00002-of-00002.ckpt": names[9:]}
    for file, part in shards.items():
        write_mindspore_ckpt(folder / file, {name: WEIGHTS[name] for name in part})
    (folder / "llama.ckpt").unlink()
    with pytest.raises(ModelError, match=r"holds 2 \.ckpt files and no single index"):
        open_checkpoint(folder)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "mindspore_model.ckpt.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(folder).sha256() == REFERENCE.sha256()


@pytest.mark.parametrize("sharded", [False, True])
def test_safetensors_of_mindspore(folder: Path, sharded: bool) -> None:
    (folder / "llama.ckpt").unlink()
    if sharded:
        files = {name: f"model_{i % 2}.safetensors" for i, name in enumerate(WEIGHTS)}
        for file in set(files.values()):
            part = {name: WEIGHTS[name].clone() for name in files if files[name] == file}
            save_file(part, folder / file, metadata={"format": "ms"})
        (folder / "param_name_map.json").write_text(json.dumps(files))
    else:
        save_file(WEIGHTS, folder / "model.safetensors", metadata={"format": "ms"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.kind == "mindformers"
    assert checkpoint.sha256() == REFERENCE.sha256()


def test_a_missing_weight_is_named_as_hugging_face_names_it(folder: Path) -> None:
    write_mindspore_ckpt(folder / "llama.ckpt", {n: w for n, w in WEIGHTS.items() if n != "model.norm_out.weight"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"rms_norm_eps": "1e-5", "theta": "1e6"}, {"rope_theta": 1e6}),
        ({"max_position_embedding": 512}, {"max_position_embeddings": 512}),
        ({"extend_method": "PI", "scaling_factor": 2.0}, {"rope_scaling": RopeScaling("linear", 2.0)}),
        ({"extend_method": "NTK", "scaling_factor": 2.0}, {"rope_theta": 20000.0}),
        (
            {
                "extend_method": "LLAMA3",
                "scaling_factor": {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)},
        ),
        ({"eos_token_id": [2, 3]}, {"eos_token_ids": (2, 3)}),
    ],
)
def test_fields_of_the_yaml(folder: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    write_yaml(folder, **changes)
    assert open_checkpoint(folder).config == dataclasses.replace(TINY, **expected)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"hidden_size": 4096, "num_heads": 32, "multiple_of": 256}, 11008),  # LLaMA-2 7B
        ({"hidden_size": 5120, "num_heads": 40}, 13824),  # LLaMA-2 13B
        ({"hidden_size": 8192, "num_heads": 64, "multiple_of": 256, "ffn_dim_multiplier": 1.3}, 28672),  # 70B
    ],
)
def test_feed_forward_size_of_known_models(tmp_path: Path, changes: dict[str, Any], size: int) -> None:
    write_yaml(tmp_path, intermediate_size=..., **changes)
    assert read_config(tmp_path).intermediate_size == size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "Qwen2Config"}, "Qwen2Config is not supported; only LlamaConfig is"),
        ({"moe_config": {"expert_num": 8}}, "moe_config is not supported"),
        ({"qkv_has_bias": True}, "qkv_has_bias is not supported"),
        ({"num_layers": ...}, "num_layers is missing"),
        ({"hidden_size": "wide"}, "hidden_size must be an integer"),
        ({"theta": "big"}, "theta must be a number, not 'big'"),
        ({"extend_method": "YARN"}, 'extend_method "YARN" is not supported'),
        ({"extend_method": "LLAMA3", "scaling_factor": 2.0}, 'extend_method "LLAMA3" is not supported'),
        ({"num_heads": 5}, "must be a multiple of"),
    ],
)
def test_refused_yaml(folder: Path, changes: dict[str, Any], message: str) -> None:
    write_yaml(folder, **changes)
    with pytest.raises(ModelError, match=rf"predict\.yaml: model\.model_config: .*{message}"):
        open_checkpoint(folder)


def test_which_config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write_yaml(folder, "other.yaml")
    (folder / "strategy.yaml").write_text("parallel: 1\n")
    with pytest.raises(ModelError, match=r"other\.yaml, predict\.yaml all have a model\.model_config; keep one"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, config=folder / "other.yaml").config == TINY
    with pytest.raises(ModelError, match=r"strategy\.yaml: has no model\.model_config"):
        open_checkpoint(folder, config=folder / "strategy.yaml")
    with pytest.raises(ModelError, match=r"none\.yaml: cannot be read"):
        open_checkpoint(folder, config=folder / "none.yaml")
    (folder / "config.json").write_text(json.dumps(TINY.to_hf_dict() | {"rope_theta": 5.0}))
    assert open_checkpoint(folder).config.rope_theta == 5.0
    (folder / "config.json").write_text(json.dumps(SECTION | {"theta": 6.0}))
    assert open_checkpoint(folder).config.rope_theta == 6.0


def test_malformed_yaml_names_the_line(folder: Path) -> None:
    (folder / "predict.yaml").write_text("model:\n  model_config: {\n")
    with pytest.raises(ModelError, match=r"predict\.yaml, line 3: is not valid YAML"):
        open_checkpoint(folder)


def test_no_config_at_all(folder: Path) -> None:
    (folder / "predict.yaml").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json, nor a MindFormers YAML with model\.model_config"):
        open_checkpoint(folder / "llama.ckpt")
