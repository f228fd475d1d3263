"""A prompt whose logits are NaN costs its own answer, not the run's."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from tests.cli.conftest import Invoke, read_jsonl, write_jsonl

POISON = 77  # a token whose embedding is NaN


def test_the_others_finish_and_the_certificate_says_why_it_is_invalid(
    invoke: Invoke, model: Path, tmp_path: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(tensors, model / "model.safetensors")
    good = {f"good{i}": [1, 10 + i, 20, 30] for i in range(4)}
    file = write_jsonl(
        tmp_path / "prompts.jsonl",
        {"id": "bad", "prompt_token_ids": [1, POISON, 5], "max_new_tokens": 6},
        *({"id": name, "prompt_token_ids": ids, "max_new_tokens": 6} for name, ids in good.items()),
    )
    arguments = ("run", "--model", model, "--dataset", file, "--baseline-requests", 0)
    done = invoke(*arguments, "--output", tmp_path / "out")
    assert done.exit_code == 1, done.output
    found = {line["id"]: line for line in read_jsonl(tmp_path / "out" / "outputs.jsonl")}
    assert set(found) == {"bad", *good}
    assert "NaN" in found["bad"]["error"]
    assert all(found[name]["token_ids"] and found[name]["error"] is None for name in good)
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["verdict"] == "INVALID"
