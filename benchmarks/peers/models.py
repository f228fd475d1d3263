"""Model folders that every system can open: seeded random weights of a preset's shape, as Hugging Face files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.config import PRESETS

MODELS = Path(__file__).parent / ".models"
CONTEXT = 4096  # room for 2048 prompt tokens and more; rotary embeddings have no weights, so any length will do


def model_folder(preset: str, *, seed: int, dtype: str) -> Path:
    """The folder of `preset` with weights drawn from `seed` and stored in `dtype`; it is made when missing."""
    folder = MODELS / f"{preset}-{dtype}-seed{seed}"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        config = replace(PRESETS[preset], max_position_embeddings=CONTEXT)
        checkpoint = dummy_checkpoint(config, seed=seed, dtype=dtype)
        save_file(dict(checkpoint.tensors), unfinished / "model.safetensors", metadata={"format": "pt"})
        _write_json(unfinished / "config.json", checkpoint.config.to_hf_dict())
        _write_tokenizer(unfinished, config.vocab_size)
        unfinished.rename(folder)
    return folder


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One word per id: some converters want a vocabulary, and none of these tokens is ever text."""
    words = {f"<{i}>": i for i in range(vocab_size)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<0>"},
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<0>", "bos_token": "<1>", "eos_token": "<2>"},
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
