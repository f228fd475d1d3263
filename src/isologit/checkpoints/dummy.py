"""Random weights of true shapes: the same numbers for the same seed on every machine, made when they are read."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from isologit.checkpoints.checkpoint import Checkpoint
from isologit.checkpoints.stored import EMBEDDING, HEAD, WEIGHT_DTYPES, LazyTensors, StoredTensor, expected_shapes
from isologit.config import ModelConfig
from isologit.errors import ConfigError
from isologit.text.tokenizer import DUMMY_SOURCE

_WEIGHT_STD = 0.02
_GAIN_STD = 0.02
_LOGIT_STD = 2.5  # spread of the logits: decided by the head, since the last norm gives rows of unit mean square


def dummy_checkpoint(config: ModelConfig, *, seed: int = 0, dtype: str = "float32") -> Checkpoint:
    """A checkpoint of `config`'s shapes: normal weights, norm gains about 1, rounded to `dtype`.

    Every tensor is drawn anew at each access from a seed made of (`seed`, name). Raises ConfigError for another dtype
    than float16, bfloat16 or float32.
    """
    if dtype not in WEIGHT_DTYPES:
        raise ConfigError(f'dtype "{dtype}" is not supported; use one of {", ".join(WEIGHT_DTYPES)}')
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    stored = {}
    for name, shape in expected_shapes(config).items():
        mean, std = (1.0, _GAIN_STD) if name.endswith("norm.weight") else (0.0, _WEIGHT_STD)
        if name == head:
            std = _LOGIT_STD / config.hidden_size**0.5
        load = partial(_draw, name, shape, seed, mean, std, WEIGHT_DTYPES[dtype])
        stored[name] = StoredTensor(shape, dtype, DUMMY_SOURCE, load)
    return Checkpoint(replace(config, dtype=dtype), LazyTensors(stored), DUMMY_SOURCE, "dummy")


def _draw(name: str, shape: tuple[int, ...], seed: int, mean: float, std: float, dtype: torch.dtype) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    values = generator.standard_normal(shape, dtype=np.float32)
    values *= np.float32(std)
    values += np.float32(mean)
    return torch.from_numpy(values).to(dtype)
