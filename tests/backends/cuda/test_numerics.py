"""Every numeric scheme of the CUDA backend: what it may lose against float32, and that it does not keep more."""

from __future__ import annotations

import numpy as np
import pytest
from tests.backends.conformance.batches import make_batch

from isologit.backends.base import LoadOptions, Memory
from isologit.backends.cuda.backend import CUDABackend
from isologit.backends.cuda.numerics import SCHEMES
from isologit.backends.cuda.sizes import kv_block_bytes
from isologit.backends.torch.backend import TorchBackend
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.config import ModelConfig

CONFIG = ModelConfig.from_hf_dict(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "torch_dtype": "float16",
    },
    "here",
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(3, 200, 20).tolist()
BOUNDS = {  # largest error of a logit, of which the largest is 10; a scheme that keeps less loses more: the inverse
    "float16x2-kv24": (0.0, 3e-4),
    "float16x2-kv32": (0.0, 1e-4),
    "float16x2-kv16": (5e-4, 5e-3),
    "float16-kv24": (1e-3, 1e-2),
    "float16-kv32": (1e-3, 1e-2),
    "float16-kv16": (1e-3, 1e-2),
}
needs_kernels = pytest.mark.skipif(CUDABackend.why_not("auto") is not None, reason="no GPU, and no interpreter")


def logits_of(backend: type[CUDABackend] | type[TorchBackend], numerics: str) -> tuple[np.ndarray, Memory, dict]:
    """float32 [tokens, vocab] of a prompt on the backend, the memory it took, and what it says of itself."""
    options = LoadOptions(max_model_len=64, num_threads=1, numerics=numerics)
    loaded = backend.load(dummy_checkpoint(CONFIG, dtype="float16"), options)
    loaded.allocate_kv(2)
    loaded.reserve(32)
    logits = loaded.forward(make_batch([(TOKENS, 0, [1, 0])], loaded.block_size)).logits.copy()
    assert loaded.memory() == backend.plan_memory(CONFIG, options, 32)
    found = logits, loaded.memory(), loaded.describe()
    loaded.close()
    return found


@needs_kernels
@pytest.mark.parametrize("numerics", SCHEMES)
def test_cuda_schemes_are_within_their_bounds(numerics: str) -> None:
    want, _, _ = logits_of(TorchBackend, "float32")
    got, _, said = logits_of(CUDABackend, numerics)
    least, most = BOUNDS[numerics]
    assert least <= np.abs(got - want).max() < most
    assert said["numerics"] == numerics


def test_a_scheme_says_what_its_keys_and_values_take() -> None:
    bits = {name: 8 * scheme.kv_bytes for name, scheme in SCHEMES.items()}
    assert all(name.endswith(f"-kv{found}") for name, found in bits.items())
    assert kv_block_bytes(CONFIG, 3) == 3 * 2 * 32 * 16


def test_the_default_is_the_pair_with_fp8() -> None:
    assert next(iter(SCHEMES)) == "float16x2-kv24"
