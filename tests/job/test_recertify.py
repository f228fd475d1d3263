"""A finished run's folder is enough to make its certificate again, and every change to it is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, safe_open, save_file

from isologit.config import EngineOptions
from isologit.errors import OutputFolderError
from isologit.job.options import RunOptions
from isologit.job.recertify import recertify
from isologit.job.run import run_job
from isologit.workload import demo_model_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight requests, one of which never can run."""
    folder = tmp_path_factory.mktemp("finished")
    texts = ["Count from 3 to 20.\n", "List 6 tools.\n", "Describe the fox.\n", "", "Describe the owl.\n"] * 2
    lines = [{"id": f"r{i}", "prompt": text, "max_new_tokens": 12} for i, text in enumerate(texts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = RunOptions(
        engine=EngineOptions(num_threads=1),
        dataset=folder / "prompts.jsonl",
        output=folder / "out",
        baseline_requests=0,
    )
    assert run_job(options).valid
    return folder / "out"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_certificate_is_the_same(folder: Path) -> None:
    (folder / "steps.jsonl").unlink()
    before = json.loads((folder / "certificate.json").read_text())
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = recertify(folder)
    again = found.to_dict()
    assert found.verdict.valid
    for key in ("captured", "greedy", "noise_floor", "hashes", "mode"):
        assert again[key] == before[key]
    for key in ("issued", "completed", "failed", "refused", "rescored"):
        assert again["requests"][key] == before["requests"][key]
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _edit_line(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
        change(lines[2])
        (folder / "outputs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


def _drop_a_line(folder: Path) -> None:
    lines = (folder / "outputs.jsonl").read_text().splitlines(keepends=True)
    (folder / "outputs.jsonl").write_text("".join(lines[:-1]))


def _spoil_a_row(folder: Path) -> None:
    path = folder / "logits" / "captures.safetensors"
    arrays = load_arrays(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays["rows"][0, 5] += np.float32(0.01)
    from safetensors.numpy import save_file as save_arrays

    save_arrays(arrays, path, metadata)


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (_edit_line(lambda line: line["token_ids"].__setitem__(4, line["token_ids"][4] ^ 1)), "not_greedy"),
    (_edit_line(lambda line: line["prompt_token_ids"].pop()), "other_prompts"),
    (_edit_line(lambda line: line.update(max_tokens=13)), "other_prompts"),
    (_drop_a_line, "other_prompts"),
    (_spoil_a_row, "over_tolerance"),
]


@pytest.mark.parametrize(("change", "code"), CHANGES)
def test_every_change_is_seen(change: Callable[[Path], None], code: str, folder: Path) -> None:
    change(folder)
    found = recertify(folder)
    assert not found.verdict.valid
    assert code in [reason.code for reason in found.reasons]


def test_another_model_is_not_the_runs(folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(demo_model_path(), tmp_path / "moved"))
    assert recertify(folder, model=str(moved)).verdict.valid
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"] *= 1.02
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    codes = [reason.code for reason in recertify(folder, model=str(moved)).reasons]
    assert codes[0] == "other_weights"
    assert "over_tolerance" in codes


def test_folders_that_cannot_be_checked_say_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputFolderError, match="holds no finished run"):
        recertify(tmp_path)
    result = json.loads((folder / "result.json").read_text())
    result["options"]["save_logits"] = "none"
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(OutputFolderError, match="--save-logits captured"):
        recertify(folder)
    (folder / "result.json").write_text("{")
    with pytest.raises(OutputFolderError, match="damaged"):
        recertify(folder)
