"""Every backend that this machine can use, with small models and the reference's answers for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from isologit import LLM
from isologit.backends.base import Backend, LoadOptions
from isologit.backends.registry import available, load_backend
from isologit.checkpoints.checkpoint import open_checkpoint
from isologit.errors import ModelError

VOCAB, MAX_MODEL_LEN = 300, 256
_SHAPES: dict[str, dict[str, Any]] = {
    "gqa-float16": {"heads": 4, "kv_heads": 2, "tied": False, "dtype": torch.float16},
    "mha-tied-float32": {"heads": 3, "kv_heads": 3, "tied": True, "dtype": torch.float32},
    "biases-float16": {"heads": 2, "kv_heads": 1, "tied": False, "dtype": torch.float16, "biases": True},
}
_BACKENDS = [found.name for found in available() if found.usable]


def tolerance(described: dict[str, Any]) -> float:
    """How far logits may be from the reference's: rounding of float32, or half of what a certificate allows."""
    return 1e-4 if described["compute_dtype"] == "float32" else 2.5e-3


@dataclass
class Model:
    """A saved model and its float32 twin in transformers."""

    folder: Path
    reference: LlamaForCausalLM
    _rows: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def rows(self, token_ids: list[int]) -> np.ndarray:
        """float32 [n, vocab]: row i follows token i."""
        key = tuple(token_ids)
        if key not in self._rows:
            with torch.inference_mode():
                self._rows[key] = self.reference(torch.tensor([token_ids])).logits[0].numpy()
        return self._rows[key]


def _save(folder: Path, heads: int, kv_heads: int, tied: bool, dtype: torch.dtype, biases: bool = False) -> Model:
    torch.manual_seed(heads)
    config = LlamaConfig(
        hidden_size=heads * 32,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    if biases:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder)
    twin = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return Model(folder, twin.eval())


@pytest.fixture(scope="session", params=list(_SHAPES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small random model."""
    return _save(tmp_path_factory.mktemp(request.param), **_SHAPES[request.param])


@pytest.fixture(scope="session", params=_BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    """A backend that this machine can use."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def backend(model: Model, backend_name: str) -> Iterator[Backend]:
    """The model on the backend, with 64 blocks of keys and values."""
    options = LoadOptions(max_model_len=MAX_MODEL_LEN, num_threads=1)
    try:
        loaded = load_backend(open_checkpoint(model.folder), options, backend=backend_name)
    except ModelError as error:
        pytest.skip(f"not a model for {backend_name}: {error}")
    loaded.allocate_kv(64)
    loaded.reserve(128)
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def llm(model: Model, backend_name: str) -> Iterator[LLM]:
    """The engine over the backend, without speculation or prefix reuse: the simplest way to run."""
    try:
        made = LLM(model.folder, backend=backend_name, num_threads=1, max_num_seqs=8, enable_prefix_caching=False)
    except ModelError as error:
        pytest.skip(f"not a model for {backend_name}: {error}")
    yield made
    made.close()
