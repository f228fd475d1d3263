"""The streamed reference is the whole one bit for bit, whatever the model's shape, and notices one changed weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fidelity.tiny_model import EOS, VOCAB, TinyCheckpoint, tiny_checkpoint

from isologit.errors import ModelError
from isologit.fidelity import Reference, ScoredRequest, StreamedReference, certify, streamed
from isologit.fidelity.reference import Sample, noise_samples

SHAPES: list[dict[str, Any]] = [
    {},
    {"tied": True},
    {"num_key_value_heads": 1, "num_hidden_layers": 3},
    {"num_key_value_heads": 4, "head_dim": 16},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "rope_theta": 500000.0,
        }
    },
    {"attention_bias": True, "mlp_bias": True},
    {"hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 1},
]  # fmt: skip


def samples(count: int = 6) -> list[Sample]:
    """Prompts of 1 to 40 tokens and outputs of 1 to 24."""
    rng = np.random.default_rng(1)
    lengths = [(1, 24), (40, 1), (7, 7), (23, 12), (5, 18), (33, 3)][:count]
    return [(rng.integers(3, VOCAB, p).tolist(), rng.integers(3, VOCAB, n).tolist()) for p, n in lengths]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models so small are slower on several threads, by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(shape) or "plain")
def test_every_row_is_the_whole_references_bit_for_bit(shape: dict[str, Any]) -> None:
    _same_bits(tiny_checkpoint(**shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_16_bits_are_widened_alike(dtype: torch.dtype) -> None:
    checkpoint = tiny_checkpoint()
    checkpoint.tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors.items()}
    _same_bits(checkpoint)


def test_threads_change_nothing() -> None:
    torch.set_num_threads(2)
    checkpoint = tiny_checkpoint(hidden_size=64, num_hidden_layers=1)
    np.testing.assert_array_equal(
        StreamedReference(checkpoint).score(*samples()[3]), Reference(checkpoint).score(*samples()[3])
    )


def _same_bits(checkpoint: TinyCheckpoint) -> None:
    whole, layerwise = Reference(checkpoint), StreamedReference(checkpoint)
    found = list(layerwise.score_all(samples()))
    assert len(found) == 6
    for rows, expected in zip(found, whole.score_all(samples()), strict=True):
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, expected)
    chosen = noise_samples(samples())
    assert layerwise.noise_floor(chosen) == whole.noise_floor(chosen)
    np.testing.assert_array_equal(layerwise.score(*samples()[2]), found[2])


def test_a_folder_is_read_without_our_reader(tmp_path: Path) -> None:
    Reference(tiny_checkpoint())._model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint = tiny_checkpoint()
    checkpoint.kind, checkpoint.source, checkpoint.tensors = "huggingface", tmp_path, {}
    whole, layerwise = Reference(checkpoint), StreamedReference(checkpoint)
    for rows, expected in zip(layerwise.score_all(samples()), whole.score_all(samples()), strict=True):
        np.testing.assert_array_equal(rows, expected)
    assert layerwise.identity()["loaded_by"] == "safetensors"


def _certify(reference: Any, engine: Reference, **options: Any) -> Any:
    """The certificate of a run of `engine`."""
    records, captured = [], {}
    for i, (prompt, _) in enumerate(samples()):
        tokens = engine.generate(prompt, 9, [EOS], ignore_eos=True)
        records.append(ScoredRequest(str(i), prompt, tokens, "length", 9, ignore_eos=True))
        captured[str(i), 4] = engine.score(prompt, tokens)[4]
    ids = [str(i) for i in range(6)]
    return certify(records, captured, reference, expected_ids=ids, eos_token_ids=[EOS], **options)


def test_the_certificate_is_the_whole_references(reference: Reference) -> None:
    found = _certify(StreamedReference(tiny_checkpoint()), reference).to_dict()
    expected = _certify(reference, reference).to_dict()
    assert found["verdict"] == "VALID"
    assert "streamed" in found["reference"]["how"]
    assert "whole" in expected["reference"]["how"]
    for key in ("captured", "greedy", "noise_floor"):
        assert found[key] == expected[key]


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_one_changed_weight_makes_it_invalid(name: str, reference: Reference) -> None:
    checkpoint = tiny_checkpoint()
    checkpoint.tensors[name].view(-1)[33 if "norm" not in name else 3] += 3.0
    assert _certify(StreamedReference(checkpoint), reference).verdict.status == "INVALID"


def test_a_budget_is_kept_by_choosing_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    layerwise = StreamedReference(tiny_checkpoint())
    assert len(list(layerwise.score_all(samples(), time_budget_s=1e-9))) == 1
    assert len(list(layerwise.score_all(samples(), time_budget_s=1000.0))) == 6
    noise = noise_samples(samples()[:3])
    states = 4 * 32 * (sum(len(p) + len(t) - 1 for p, t in samples()[:3]) + 4 * 41 + 56)
    monkeypatch.setattr(streamed, "STATES_BYTES", states)
    found = list(layerwise.score_all(samples()))
    assert 1 < len(found) < 6
    assert noise


def test_progress_moves_with_every_layer() -> None:
    seen: list[tuple[float, int]] = []
    for _ in StreamedReference(tiny_checkpoint()).score_all(samples(), on_progress=lambda *told: seen.append(told)):
        pass
    assert len(seen) >= 2 * 6
    assert all(of == 6 for _, of in seen)
    assert [done for done, _ in seen[-6:]] == [1, 2, 3, 4, 5, 6]
    layers = [done for done, _ in seen[:-6]]
    assert layers == sorted(layers)
    assert layers[0] < 1


def test_missing_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    del checkpoint.tensors["model.norm.weight"]
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        StreamedReference(checkpoint)
    checkpoint = tiny_checkpoint()
    checkpoint.tensors["model.norm.weight"] = torch.ones(1)
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[1\]"):
        StreamedReference(checkpoint).score([1, 2], [3])
    Reference(tiny_checkpoint())._model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:900])
    with pytest.raises(ModelError, match="cannot load"):
        StreamedReference(TinyCheckpoint(checkpoint.config, {}, "huggingface", tmp_path))
