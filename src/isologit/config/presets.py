"""True shapes of well-known models, for runs with random weights; and finding a shape by preset name or file."""

from __future__ import annotations

from pathlib import Path

from isologit.config.model_config import ModelConfig, read_json_object
from isologit.errors import ConfigError, ModelError

PRESETS: dict[str, ModelConfig] = {
    "llama2-7b": ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="float16",
    ),
    "llama2-13b": ModelConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="float16",
    ),
    "tinyllama-1.1b": ModelConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        dtype="float16",
    ),
    "llama-110m": ModelConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        dtype="float16",
    ),
}


def preset(name: str) -> ModelConfig:
    """The shape of a well-known model. Raises ConfigError for an unknown name."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f'model preset "{name}" is unknown; use one of {", ".join(PRESETS)}') from None


def load_model_config(path_or_preset: str | Path) -> ModelConfig:
    """A shape from a preset name, a `config.json`, or a folder that holds one.

    A preset name wins over a folder of the same name; write `./name` for the folder. Raises ConfigError when there is
    neither, ModelError when the file cannot be used.
    """
    if str(path_or_preset) in PRESETS:
        return PRESETS[str(path_or_preset)]
    path = Path(path_or_preset)
    if not path.exists():
        raise ConfigError(
            f'"{path_or_preset}" is neither a preset ({", ".join(PRESETS)}) nor an existing config.json or model folder'
        )
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{path}: has no config.json; add the model's own")
    return ModelConfig.from_hf_dict(read_json_object(file), file)
