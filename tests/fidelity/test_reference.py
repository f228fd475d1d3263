"""The reference against transformers used directly, and against itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fidelity.tiny_model import EOS, VOCAB, tiny_checkpoint
from transformers import LlamaForCausalLM

from isologit.errors import ModelError
from isologit.fidelity import Reference

PROMPT = [1, 5, 9, 33, 60]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model saved by transformers itself."""
    Reference(tiny_checkpoint())._model.save_pretrained(tmp_path)
    return tmp_path


def test_folder_and_tensors_give_the_same_rows(folder: Path, reference: Reference) -> None:
    checkpoint = tiny_checkpoint()
    checkpoint.kind, checkpoint.source, checkpoint.tensors = "huggingface", folder, {}
    loaded = Reference(checkpoint)
    assert loaded.identity()["loaded_by"] != reference.identity()["loaded_by"]
    np.testing.assert_allclose(loaded.score(PROMPT, [4, 8]), reference.score(PROMPT, [4, 8]), atol=1e-5)


def test_score_gives_the_row_that_chooses_each_token(folder: Path, reference: Reference) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        whole = model(input_ids=torch.tensor([[*PROMPT, 4, 8, 15]])).logits[0].numpy()
    rows = reference.score(PROMPT, [4, 8, 15])
    assert rows.dtype == np.float32
    assert rows.shape == (3, VOCAB)
    np.testing.assert_allclose(rows, whole[len(PROMPT) - 1 : -1], atol=1e-5)


def test_generate_is_what_transformers_generates(folder: Path, reference: Reference) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    prompt = torch.tensor([PROMPT])
    theirs = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None
    )
    ours = reference.generate(PROMPT, 40, [EOS], ignore_eos=True)
    assert ours == theirs[0, len(PROMPT) :].tolist()
    assert ours == reference.score(PROMPT, ours).argmax(axis=1).tolist()
    stop = ours[7]
    assert reference.generate(PROMPT, 40, [stop]) == ours[: ours.index(stop) + 1]


def test_forced_tokens_come_back_and_nothing_ends_them(reference: Reference) -> None:
    forced = [7, EOS, 11]
    assert reference.generate(PROMPT, 1, [EOS], forced=forced) == forced


def test_tied_and_half_precision_weights() -> None:
    tied = tiny_checkpoint(tied=True)
    explicit = tiny_checkpoint(tied=True)
    explicit.config.values["tie_word_embeddings"] = False
    explicit.tensors["lm_head.weight"] = explicit.tensors["model.embed_tokens.weight"]
    expected = Reference(explicit).score(PROMPT, [4])
    np.testing.assert_array_equal(Reference(tied).score(PROMPT, [4]), expected)

    half = tiny_checkpoint(tied=True)
    half.tensors = {name: tensor.half() for name, tensor in half.tensors.items()}
    rows = Reference(half).score(PROMPT, [4])
    assert rows.dtype == np.float32
    assert 0 < np.abs(rows - expected).max() < 0.1


def test_a_missing_weight_is_an_error_that_names_it() -> None:
    checkpoint = tiny_checkpoint()
    del checkpoint.tensors["model.norm.weight"]
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        Reference(checkpoint)


def test_a_folder_that_lacks_a_weight_is_not_filled_with_random_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    checkpoint = tiny_checkpoint()
    checkpoint.kind, checkpoint.source = "huggingface", folder
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        Reference(checkpoint)


def test_noise_floor_is_rounding_and_nothing_more(reference: Reference) -> None:
    samples = [(PROMPT, [4, 8, 15]), ([1, 2, 3, 4, 5, 6, 7, 8, 9], [16, 23]), ([1], [42] * 20)]
    found = reference.noise_floor(samples)
    assert found.rows == 3 + 2 + 20 + 3  # the first sample once more, token by token
    assert found.max_abs < 1e-4


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    Reference(tiny_checkpoint(), num_threads=before + 1).score(PROMPT, [4])
    assert torch.get_num_threads() == before
