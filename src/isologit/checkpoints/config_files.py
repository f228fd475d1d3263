"""Finding a model's config beside its weights: Hugging Face's `config.json` or a MindFormers YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from isologit.config.model_config import ARCHITECTURE, ModelConfig, read_json_object
from isologit.errors import ModelError

_YAML_SUFFIXES = (".yaml", ".yml")

# MindFormers' field: (Hugging Face's field, MindFormers' default); fields without a default must be there.
_REQUIRED = object()
_MINDFORMERS_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", _REQUIRED),
    "hidden_size": ("hidden_size", _REQUIRED),
    "num_layers": ("num_hidden_layers", _REQUIRED),
    "num_heads": ("num_attention_heads", _REQUIRED),
    "n_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "rms_norm_eps": ("rms_norm_eps", 1e-5),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", 0),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}


def read_config(folder: Path, override: Path | None = None) -> ModelConfig:
    """The config in `folder`: `config.json`, else the only YAML with a `model.model_config`; or the file `override`.

    End tokens that `generation_config.json` names replace those of `config.json`: Hugging Face's `generate` stops at
    them. Raises ModelError when there is no config, more than one, or one that cannot be used.
    """
    file = override or folder / "config.json"
    if file.suffix in _YAML_SUFFIXES:
        section = _model_section(file)
        if section is None:
            raise ModelError(f"{file}: has no model.model_config; give the YAML of the model")
        return _from_mindformers(section, f"{file}: model.model_config")
    if override is not None or file.is_file():
        return _from_json(file)
    found = {f: s for f in sorted(folder.iterdir()) if f.suffix in _YAML_SUFFIXES and (s := _model_section(f))}
    if len(found) > 1:
        raise ModelError(f"{folder}: {', '.join(f.name for f in found)} all have a model.model_config; keep one")
    if not found:
        raise ModelError(
            f"{folder}: has no config.json, nor a MindFormers YAML with model.model_config; add the model's own"
        )
    ((file, section),) = found.items()
    return _from_mindformers(section, f"{file}: model.model_config")


def _from_json(file: Path) -> ModelConfig:
    d = read_json_object(file)
    if "num_layers" in d and "num_hidden_layers" not in d:  # written by MindFormers
        return _from_mindformers(d, str(file))
    generation = file.parent / "generation_config.json"
    if generation.is_file():
        eos = read_json_object(generation).get("eos_token_id")
        if eos is not None:
            d["eos_token_id"] = eos
    return ModelConfig.from_hf_dict(d, file)


def _model_section(file: Path) -> dict[str, Any] | None:
    """`model.model_config` of a YAML file, or None when it has none. Raises ModelError for malformed YAML."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ModelError(f"{file}{line}: is not valid YAML; fix it or copy it again") from None
    model = document.get("model") if isinstance(document, dict) else None
    section = model.get("model_config") if isinstance(model, dict) else None
    return section if isinstance(section, dict) else None


def _from_mindformers(section: Mapping[str, Any], source: str) -> ModelConfig:
    """A config from MindFormers' `LlamaConfig` fields. Raises ModelError naming the field."""
    kind = section.get("type", "LlamaConfig")
    if kind != "LlamaConfig":
        raise ModelError(f"{source}: {kind} is not supported; only LlamaConfig is")
    moe = section.get("moe_config")
    if isinstance(moe, Mapping) and (moe.get("expert_num") or 1) > 1:
        raise ModelError(f"{source}: moe_config is not supported; only dense LLaMA models are")
    for name in ("qkv_has_bias", "attn_proj_has_bias", "quant", "quant_config"):
        if section.get(name):
            raise ModelError(f"{source}: {name} is not supported; only plain LLaMA weights without bias are")
    d: dict[str, Any] = {"architectures": [ARCHITECTURE]}
    for theirs, (ours, default) in _MINDFORMERS_FIELDS.items():
        value = section.get(theirs)
        if value is None and default is _REQUIRED:
            raise ModelError(f"{source}: {theirs} is missing; a LLaMA config needs it")
        d[ours] = default if value is None else value
    d["rms_norm_eps"] = _number(section, "rms_norm_eps", 1e-5, source)
    d["intermediate_size"] = _intermediate_size(section, source)
    d["max_position_embeddings"] = section.get("max_position_embedding") or section.get("seq_length") or 2048
    d["rope_theta"], d["rope_scaling"] = _rope(section, source)
    return ModelConfig.from_hf_dict(d, source)


def _intermediate_size(section: Mapping[str, Any], source: str) -> int:
    """Width of the feed-forward layer, in the arithmetic of MindFormers' LlamaFeedForward when it is not given."""
    if section.get("intermediate_size") is not None:
        return int(_number(section, "intermediate_size", 0, source))
    multiple = int(_number(section, "multiple_of", 256, source))
    size = 4 * int(_number(section, "hidden_size", 0, source))
    if section.get("ffn_dim_multiplier") is not None:
        size = int((_number(section, "ffn_dim_multiplier", 1, source) + 0.01) * size)
    size = int(2 * size / 3)
    return multiple * -(-size // max(multiple, 1))


def _rope(section: Mapping[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """Rotary base and Hugging Face's rope_scaling for `theta`, `extend_method` and `scaling_factor`."""
    theta = _number(section, "theta", 10000.0, source)
    method = str(section.get("extend_method") or "None")
    if method == "None":
        return theta, None
    scaling = section.get("scaling_factor")
    if method == "LLAMA3" and isinstance(scaling, Mapping):
        return theta, {"rope_type": "llama3", **scaling}
    if method == "PI":
        return theta, {"rope_type": "linear", "factor": _number(section, "scaling_factor", 1.0, source)}
    if method == "NTK":  # static: the base alone grows
        return theta * _number(section, "scaling_factor", 1.0, source), None
    raise ModelError(f'{source}: extend_method "{method}" is not supported; use "None", "PI", "NTK" or "LLAMA3"')


def _number(section: Mapping[str, Any], name: str, default: float, source: str) -> float:
    """A number; also one like 1e-5, which YAML without a decimal point reads as text."""
    value = section.get(name)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        raise ModelError(f"{source}: {name} must be a number, not {value!r}") from None
