"""A tiny random LLaMA whose logits spread over several units, as a checkpoint without files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 97
EOS = 2


@dataclass
class TinyConfig:
    values: dict[str, Any]

    def to_hf_dict(self) -> dict[str, Any]:
        return self.values


@dataclass
class TinyCheckpoint:
    config: TinyConfig
    tensors: dict[str, torch.Tensor]
    kind: str = "dummy"
    source: Path = Path("tiny")


def tiny_checkpoint(*, tied: bool = False, **shape: Any) -> TinyCheckpoint:
    """The same weights every time, in new tensors every time. shape: fields of the configuration that are others."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    config = LlamaConfig(**{**fields, **shape})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if tied:
        shapes.pop("lm_head.weight")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        center, spread = (1.0, 0.1) if "norm" in name else (0.0, 0.3)
        tensors[name] = center + spread * torch.randn(shape, generator=generator)
    return TinyCheckpoint(TinyConfig(config.to_dict()), tensors)
