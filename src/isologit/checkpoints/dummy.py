"""Random weights of true shapes: the same numbers for the same seed on every machine, made when they are read."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from functools import partial

import numpy as np

from isologit.checkpoints import random_numbers
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.checkpoints.stored import EMBEDDING, HEAD, WEIGHT_DTYPES, LazyTensors, StoredTensor, expected_shapes
from isologit.config import ModelConfig
from isologit.errors import ConfigError
from isologit.text.tokenizer import DUMMY_SOURCE

_WEIGHT_STD = 0.02
_NORM_STD = 0.02
_LOGIT_STD = 2.5  # spread of the logits: decided by the head, since the last norm gives rows of unit mean square


def dummy_checkpoint(config: ModelConfig, *, seed: int = 0, dtype: str = "float32") -> Checkpoint:
    """A checkpoint of `config`'s shapes: near-normal weights (`random_numbers`), norm weights about 1, in `dtype`.

    Each tensor's numbers follow from (`seed`, name) and are made anew at each access, so its hash follows from these,
    shape, dtype, mean and spread without making them. Raises ConfigError for another dtype than float16, bfloat16 or
    float32.
    """
    if dtype not in WEIGHT_DTYPES:
        raise ConfigError(f'dtype "{dtype}" is not supported; use one of {", ".join(WEIGHT_DTYPES)}')
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    stored = {}
    for name, shape in expected_shapes(config).items():
        mean, std = (1.0, _NORM_STD) if name.endswith("norm.weight") else (0.0, _WEIGHT_STD)
        if name == head:
            std = _LOGIT_STD / math.sqrt(config.hidden_size)
        key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        made_from = f"random weights {random_numbers.VERSION} {key.hex()} {std.hex()} {mean.hex()}"
        stored[name] = StoredTensor(
            shape,
            dtype,
            DUMMY_SOURCE,
            partial(_draw, int.from_bytes(key[:8], "little"), std, mean, dtype),
            digest=hashlib.sha256(made_from.encode()).hexdigest(),
        )
    title = f"random weights, {config.num_parameters / 1e9:.2f}B parameters, seed {seed}"
    return Checkpoint(replace(config, dtype=dtype), LazyTensors(stored), DUMMY_SOURCE, "dummy", title)


def _draw(key: int, std: float, mean: float, dtype: str, first_row: int, out: np.ndarray) -> None:
    items = out.shape[1] // WEIGHT_DTYPES[dtype].itemsize
    random_numbers.fill(key, first_row * items, std, mean, dtype, out.reshape(-1))
