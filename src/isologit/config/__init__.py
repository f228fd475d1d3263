"""Frozen configuration objects, validated when built. Knows no tensors."""

from isologit.config.engine_options import EngineOptions, SpeculativeConfig, speculation
from isologit.config.model_config import ModelConfig, RopeScaling
from isologit.config.presets import PRESETS, load_model_config, preset

__all__ = [
    "PRESETS",
    "EngineOptions",
    "ModelConfig",
    "RopeScaling",
    "SpeculativeConfig",
    "load_model_config",
    "preset",
    "speculation",
]
