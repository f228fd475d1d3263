"""What a user can get wrong: one clear line, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.conftest import Invoke, write_jsonl

from isologit.job.folder import OutputFolder

Spoil = Callable[[Path], object]


def _without_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def _with_a_wrong_shape(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(63, 128, dtype=torch.float16)
    save_file(tensors, model / "model.safetensors")


def _truncated(model: Path) -> None:
    os.truncate(model / "model.safetensors", 1_000_000)


def _another_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    (model / "config.json").write_text(json.dumps(config))


MODELS: dict[str, tuple[Spoil, str]] = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "safetensors"),
    "a tensor is missing": (_without_a_tensor, "model.layers.2.mlp.up_proj.weight"),
    "a wrong shape": (_with_a_wrong_shape, "model.layers.1.self_attn.k_proj.weight"),
    "truncated weights": (_truncated, "model.safetensors"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "another architecture": (_another_architecture, "MixtralForCausalLM"),
    "no tokenizer": (lambda m: (m / "tokenizer.model").unlink(), "tokenizer"),
    "a broken tokenizer": (lambda m: (m / "tokenizer.model").write_bytes(b"nonsense"), "tokenizer.model"),
}


def refused(invoke: Invoke, out: Path, *args: object) -> str:
    """The one line of a run that was refused, having left nothing."""
    before = sorted(out.parent.iterdir())
    done = invoke("run", "--output", out, "--baseline-requests", 0, *args)
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if not line.endswith("...")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.output
    assert sorted(out.parent.iterdir()) == before
    return lines[0]


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_loaded(case: str, invoke: Invoke, model: Path, prompts: Path, tmp_path: Path) -> None:
    spoil, named = MODELS[case]
    spoil(model)
    assert named in refused(invoke, tmp_path / "out", "--model", model, "--dataset", prompts)


FILES: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "p.jsonl:2"),
    "malformed JSON": (b'[{"instruction": "a",\n "output": }]', "p.jsonl:2:12"),
    "malformed lines": (b'{"prompt": \n{"prompt" "a"}\n', "p.jsonl:1"),
    "an empty file": (b"\n", "empty"),
    "duplicate ids": (b'{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}\n', '"1" appears twice'),
    "an empty prompt": (b'{"prompt": ""}\n', "the prompt is empty"),
    "no tokens": (b'{"prompt": "a", "max_new_tokens": 0}\n', "at least 1, not 0"),
    "negative tokens": (b'{"prompt": "a", "max_new_tokens": -2}\n', "at least 1, not -2"),
    "too long": (b'{"prompt": "a", "max_new_tokens": 1024}\n', "context length is 1024 tokens"),
}


@pytest.mark.parametrize("case", FILES)
def test_prompts_that_cannot_run(case: str, invoke: Invoke, tmp_path: Path) -> None:
    content, named = FILES[case]
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    assert named in refused(invoke, tmp_path / "out", "--dataset", file)


def test_files_that_are_not_there(invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    for option in ("--model", "--dataset", "--replay", "--tokenizer"):
        arguments = [option, missing, *(() if option == "--dataset" else ("--dataset", prompts))]
        assert str(missing) in refused(invoke, tmp_path / "out", *arguments)


def test_options_that_mean_nothing(invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    for arguments, named in (
        (("--limit", 0), "limit"),
        (("--max-num-seqs", 0), "max_num_seqs"),
        (("--max-num-seqs", 64, "--max-num-batched-tokens", 8), "max_num_batched_tokens"),
        (("--load-format", "dummy"), "model"),
        (("--load-format", "dummy", "--model", "gpt-2"), "llama-110m"),
        (("--baseline-requests", "some"), "baseline-requests"),
        (("--certify-seconds", -1), "certify_seconds"),
    ):
        assert named in refused(invoke, tmp_path / "out", "--dataset", prompts, *arguments)


def test_a_folder_another_run_holds(invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    held = OutputFolder.claim(tmp_path / "out", resume=False)
    try:
        line = refused(invoke, tmp_path / "out", "--dataset", prompts)
    finally:
        held.release()
    assert f"in use by another run (process {os.getpid()})" in line


def test_a_folder_that_holds_results_is_never_overwritten(invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    assert invoke("run", "--dataset", prompts, "--output", tmp_path / "out", "--baseline-requests", 0).exit_code == 0
    before = (tmp_path / "out" / "result.json").read_bytes()
    assert "finished run" in refused(invoke, tmp_path / "out", "--dataset", prompts)
    assert "finished run" in refused(invoke, tmp_path / "out", "--dataset", prompts, "--resume")
    assert "nothing to resume" in refused(invoke, tmp_path / "new", "--dataset", prompts, "--resume")
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_memory_for_one_request_is_checked_before_anything_runs(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isologit.engine.kv_sizes._SHARE", 1e-6)
    file = write_jsonl(tmp_path / "p.jsonl", {"prompt": "Describe the fox.", "max_new_tokens": 900})
    line = refused(invoke, tmp_path / "out", "--dataset", file)
    assert "do not fit into the key/value memory" in line


def test_a_format_that_the_file_does_not_have(invoke: Invoke, model: Path, prompts: Path, tmp_path: Path) -> None:
    line = refused(invoke, tmp_path / "out", "--model", model, "--dataset", prompts, "--dataset-format", "alpaca")
    assert "malformed JSON" in line


@pytest.mark.parametrize("command", [("run",), ("serve", "--port", 0), ("bench", "throughput"), ("bench", "latency")])
def test_a_backend_that_is_unknown_is_refused_before_anything_is_read(
    invoke: Invoke, command: tuple[object, ...]
) -> None:
    done = invoke(*command, "--backend", "nonsense")
    assert done.exit_code == 2
    assert done.stderr.splitlines() == ['error: backend "nonsense" is unknown; there are cuda, cpu, torch']


@pytest.mark.parametrize("command", [("run",), ("serve", "--port", 0), ("bench", "throughput"), ("bench", "latency")])
def test_numerics_of_another_backend_are_refused_before_anything_is_read(
    invoke: Invoke, command: tuple[object, ...]
) -> None:
    done = invoke(*command, "--backend", "cpu", "--numerics", "float16-kv16")
    assert done.exit_code == 2
    assert done.stderr.splitlines() == ['error: numerics "float16-kv16" is unknown to the cpu backend; it has float32']
