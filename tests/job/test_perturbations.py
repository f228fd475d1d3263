"""The certificate of a whole run turns INVALID when the engine computes anything but the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from isologit import LLM, GenerationRequest, RequestOutput
from isologit.checkpoints.checkpoint import open_checkpoint
from isologit.config import EngineOptions
from isologit.engine.runner import Runner, StepResult
from isologit.engine.scheduler import StepPlan
from isologit.job.options import RunOptions
from isologit.job.run import RunResult, run_job
from isologit.workload import demo_model_path

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    texts = ["Count from 3 to 20.\n", "List 6 tools.\n", "Describe the fox.\n", "Describe the owl.\n"]
    lines = [{"id": f"r{i}", "prompt": texts[i % 4], "max_new_tokens": 20} for i in range(12)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(prompts: Path, tmp_path: Path, engine: type[LLM] = LLM, spoil: Callable[[Tensors], None] | None = None) -> Any:
    """A run whose engine may be wrong while it names the true checkpoint; returns the certificate."""
    folder = demo_model_path()
    if spoil is not None:
        folder = tmp_path / "spoiled"
        shutil.copytree(demo_model_path(), folder)
        tensors = load_file(folder / "model.safetensors")
        spoil(tensors)
        save_file(tensors, folder / "model.safetensors")

    def factory(*_: object) -> LLM:
        llm = engine(folder, num_threads=1)
        llm.checkpoint = open_checkpoint(demo_model_path())
        return llm

    options = RunOptions(
        engine=EngineOptions(num_threads=1), dataset=prompts, output=tmp_path / "out", baseline_requests=0
    )
    result: RunResult = run_job(options, engine_factory=factory)
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert result.valid == (certificate["verdict"] == "VALID")
    return certificate


def test_the_untouched_engine_is_valid(prompts: Path, tmp_path: Path) -> None:
    certificate = run(prompts, tmp_path)
    assert certificate["verdict"] == "VALID"
    assert certificate["captured"]["max_abs"] < 1e-4


def test_one_norm_gain_off_by_one_percent(prompts: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.1.input_layernorm.weight"] *= 1.01

    certificate = run(prompts, tmp_path, spoil=spoil)
    assert certificate["verdict"] == "INVALID"
    assert certificate["captured"]["max_abs"] > 5e-3


def test_two_heads_swapped(prompts: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        heads = tensors["model.layers.2.self_attn.q_proj.weight"].view(4, 32, 128)
        heads[[1, 2]] = heads[[2, 1]]

    assert run(prompts, tmp_path, spoil=spoil)["verdict"] == "INVALID"


def test_keys_and_values_of_another_request(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once both run, r3 reads the cache of r6."""
    execute = Runner.execute

    def confused(self: Runner, plan: StepPlan) -> StepResult:
        tables = self._tables
        if {"r3", "r6"} <= tables._row_of.keys():
            tables.array[tables._row_of["r3"]] = tables.array[tables._row_of["r6"]]
        return execute(self, plan)

    monkeypatch.setattr(Runner, "execute", confused)
    assert run(prompts, tmp_path)["verdict"] == "INVALID"


class AnswersFromMemory(LLM):
    """Gives request r5 the answer it found for r6, with r6's logits."""

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[RequestOutput]:
        found = {output.request_id: output for output in super().run(requests)}
        other = found["r6"]
        wrong = replace(found["r5"], token_ids=other.token_ids, text=other.text, captured=other.captured)
        yield from {**found, "r5": wrong}.values()


def test_an_answer_remembered_from_another_request(prompts: Path, tmp_path: Path) -> None:
    assert run(prompts, tmp_path, engine=AnswersFromMemory)["verdict"] == "INVALID"


class LosesOne(LLM):
    """Drops the longest request, which makes the time shorter."""

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[RequestOutput]:
        return (output for output in super().run(requests) if output.request_id != "r0")


def test_a_request_that_vanishes(prompts: Path, tmp_path: Path) -> None:
    certificate = run(prompts, tmp_path, engine=LosesOne)
    assert certificate["verdict"] == "INVALID"
