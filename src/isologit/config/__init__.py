"""Frozen configuration objects, validated when built. Knows no tensors."""

from isologit.config.engine_config import EngineConfig, SpeculativeConfig
from isologit.config.model_config import ModelConfig, RopeScaling
from isologit.config.presets import PRESETS, load_model_config

__all__ = ["PRESETS", "EngineConfig", "ModelConfig", "RopeScaling", "SpeculativeConfig", "load_model_config"]
