"""ModelConfig against transformers' LlamaConfig, and every refusal."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from isologit.config import PRESETS, ModelConfig, RopeScaling, load_model_config, preset
from isologit.config.model_config import read_json_object
from isologit.errors import ConfigError, ModelError

TINY = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
VARIANTS = {
    "plain": TINY,
    "llama3": dataclasses.replace(TINY, rope_scaling=LLAMA3, rope_theta=500000.0),
    "linear": dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 2.0)),
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True),
    "biases": dataclasses.replace(TINY, attention_bias=True, mlp_bias=True),
    "wide heads": dataclasses.replace(TINY, head_dim=16),
    "tokens": dataclasses.replace(TINY, bos_token_id=None, eos_token_ids=(3, 4), pad_token_id=0, dtype="bfloat16"),
}

KEYS_AND_VALUES = ("self_attn.k_proj", "self_attn.v_proj")


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_round_trip_through_transformers(config: ModelConfig) -> None:
    theirs = LlamaConfig(**config.to_hf_dict())
    assert ModelConfig.from_hf_dict(config.to_hf_dict(), "here") == config
    assert ModelConfig.from_hf_dict(theirs.to_dict() | {"architectures": ["LlamaForCausalLM"]}, "here") == config


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_parameter_counts(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config.to_hf_dict()))
    assert config.num_parameters == model.num_parameters()
    products = [p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    head = model.lm_head.weight.numel() if config.tie_word_embeddings else 0
    assert config.num_matmul_parameters == sum(products) + head


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_token_without_logits_ends_at_the_last_keys_and_values(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config.to_hf_dict()))
    last = dict(model.model.layers[-1].named_parameters())
    left_out = sum(p.numel() for name, p in last.items() if p.dim() == 2 and not name.startswith(KEYS_AND_VALUES))
    left_out += model.lm_head.weight.numel()
    assert config.product_flop(5, 5) == 10 * config.num_matmul_parameters
    assert config.product_flop(5, 2) == config.product_flop(5, 5) - 2 * 3 * left_out


def test_published_parameter_counts() -> None:
    counts = {name: PRESETS[name].num_parameters for name in ("llama2-7b", "llama2-13b", "tinyllama-1.1b")}
    assert counts == {"llama2-7b": 6738415616, "llama2-13b": 13015864320, "tinyllama-1.1b": 1100048384}


def test_old_and_new_rope_spellings_agree() -> None:
    base = {name: value for name, value in TINY.to_hf_dict().items() if not name.startswith("rope")}
    scaling = LLAMA3.to_hf_dict()
    old = base | {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "llama3", **{k: scaling[k] for k in scaling if k != "rope_type"}},
    }
    new = base | {"rope_parameters": {"rope_theta": 5e5, **scaling}}
    assert ModelConfig.from_hf_dict(old, "here") == ModelConfig.from_hf_dict(new, "here")
    assert ModelConfig.from_hf_dict(new, "here").rope_scaling == LLAMA3


def test_defaults_of_missing_fields() -> None:
    d = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pretraining_tp": 2,
    }
    config = ModelConfig.from_hf_dict(d, "here")
    assert (config.head_dim, config.num_key_value_heads, config.rms_norm_eps) == (8, 4, 1e-6)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), None)
    assert ModelConfig.from_hf_dict(d | {"eos_token_id": None, "pad_token_id": -1}, "x").eos_token_ids == ()


def test_harmless_spellings() -> None:
    d = TINY.to_hf_dict()
    for change in (
        {"hidden_act": "swish"},
        {"dtype": None, "torch_dtype": "float64"},
        {"dtype": "torch.double"},
        {"dtype": "auto"},
        {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
    ):
        assert ModelConfig.from_hf_dict(d | change, "here") == TINY
    assert ModelConfig.from_hf_dict(d | {"dtype": "half"}, "here").dtype == "float16"


def test_linear_scaling_lengthens_the_context() -> None:
    assert TINY.context_length == TINY.max_position_embeddings == 2048
    assert VARIANTS["linear"].context_length == 4096
    assert VARIANTS["llama3"].context_length == 2048


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM is not supported; only LlamaForCausalLM is"),
    ({"architectures": []}, r"\[\] is not supported"),
    ({"architectures": None, "model_type": None}, "names no model"),
    ({"model_type": "mistral"}, 'model_type "mistral" is not supported'),
    ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported'),
    ({"hidden_act": 3}, "hidden_act must be a string"),
    ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"hidden_size": "32"}, "hidden_size must be an integer, not '32'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, not 0"),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads must be at least 1"),
    ({"num_attention_heads": 5}, r"hidden_size \(32\) must be a multiple of num_attention_heads \(5\)"),
    ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be positive"),
    ({"rms_norm_eps": True}, "rms_norm_eps must be a number"),
    ({"rope_theta": -1.0}, "rope_theta must be positive"),
    ({"dtype": "float8"}, 'dtype "float8" is not supported'),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ({"eos_token_id": [2, "x"]}, "eos_token_id must be an integer or a list of integers"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
    ({"rope_scaling": 4.0}, "rope_scaling must be an object or null"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling type "dynamic" is not supported'),
    *(
        ({field: {"rope_type": kind, "factor": 2.0}}, f'"{kind}" is not supported')
        for kind in ROPE_INIT_FUNCTIONS if kind not in ("default", "linear", "llama3")
        for field in ("rope_parameters", "rope_scaling")
    ),
    ({"architectures": ["LlamaModel", "MistralForCausalLM"]}, "LlamaModel, MistralForCausalLM is not supported"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'rope_scaling type "yarn" is not supported'),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1"),
    ({"rope_scaling": LLAMA3.to_hf_dict() | {"high_freq_factor": 1.0}}, "0 < low_freq_factor < high_freq_factor"),
    ({"rope_scaling": LLAMA3.to_hf_dict() | {"original_max_position_embeddings": 0}}, "must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refusals_name_source_and_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=rf"^model/config\.json: .*{message}") as caught:
        ModelConfig.from_hf_dict(TINY.to_hf_dict() | change, "model/config.json")
    assert "\n" not in str(caught.value)


def test_building_an_impossible_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a multiple"):
        dataclasses.replace(TINY, num_key_value_heads=3)


def test_sha256_tells_configs_apart() -> None:
    hashes = {config.sha256 for config in VARIANTS.values()}
    assert len(hashes) == len(VARIANTS)
    assert TINY.sha256 == dataclasses.replace(TINY).sha256


def test_load_model_config(tmp_path: Any) -> None:
    assert load_model_config("llama-110m") == PRESETS["llama-110m"] == preset("llama-110m")
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    assert load_model_config(tmp_path) == load_model_config(str(tmp_path / "config.json")) == TINY


def test_load_model_config_refusals(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r'"llama-9b" is neither a preset .*llama2-7b.* nor an existing'):
        load_model_config("llama-9b")
    with pytest.raises(ConfigError, match='preset "llama-9b" is unknown; use one of llama2-7b'):
        preset("llama-9b")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "a": 1,\n}', "config.json, line 3: is not valid JSON"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b'{"a": "\xff"}', "is not UTF-8"),
    ],
)
def test_malformed_json_names_file_and_line(tmp_path: Any, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model_config(tmp_path)


def test_unreadable_json(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_json_object(tmp_path)
