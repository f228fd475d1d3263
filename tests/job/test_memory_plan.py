"""What a run will hold, and what is chosen when there is less: the whole reference, a streamed one, which baseline."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isologit.backends.registry import choose_backend
from isologit.common.memory import FreeMemory
from isologit.config import PRESETS, EngineOptions, ModelConfig
from isologit.errors import ConfigError, DatasetError
from isologit.fidelity import Reference
from isologit.job import preview
from isologit.job.memory_plan import GIB, MemoryPlan, plan_memory
from isologit.job.options import RunOptions
from isologit.job.proof import load_reference
from isologit.job.run import run_job
from isologit.llm import LLM

SEVEN = PRESETS["llama2-7b"]
LENGTHS = [(40, 128), (90, 60), (25, 200), (130, 96)]


def plan(config: ModelConfig, allowed_gib: float, **options: Any) -> MemoryPlan:
    allowed = FreeMemory(int(allowed_gib * GIB), "the machine")
    return plan_memory(EngineOptions(), config, LENGTHS, allowed, num_threads=2, captured_rows=16, **options)


@pytest.mark.parametrize(
    ("allowed", "reference", "baseline"),
    [(40.0, "whole", "float32"), (22.0, "streamed", "float16"), (14.3, "streamed", "float16")],
)
def test_seven_billion_parameters_in_what_there_is(allowed: float, reference: str, baseline: str) -> None:
    found = plan(SEVEN, allowed)
    assert found.refusal is None
    assert (found.reference, found.baseline_dtype, found.no_baseline) == (reference, baseline, None)
    assert found.host.peak.nbytes <= allowed * GIB


def test_no_baseline_is_said_beforehand_with_what_it_would_need() -> None:
    """A model of few, wide layers and long requests: the engine fits, transformers does not."""
    wide = replace(SEVEN, num_hidden_layers=2)
    allowed = FreeMemory(int(2.2 * GIB), "the control group")
    found = plan_memory(EngineOptions(), wide, [(2000, 2000)], allowed, num_threads=2)
    assert found.baseline_dtype is None
    assert found.no_baseline is not None
    assert "transformers needs" in found.no_baseline
    assert "the control group allows 2.20 GiB" in found.no_baseline
    silent = plan_memory(EngineOptions(), wide, [(2000, 2000)], allowed, num_threads=2, baseline=False)
    assert (silent.baseline_dtype, silent.no_baseline) == (None, None)


def test_what_cannot_fit_is_refused_with_the_smallest_change() -> None:
    found = plan(SEVEN, 9.0)
    assert found.refusal is not None
    with pytest.raises(
        ConfigError, match=r"stage load needs 13\.\d\d GiB .* the machine allows 9\.00 GiB; free .* more"
    ):
        found.require_fits()
    assert "smaller model" in found.refusal
    assert "16 bits" in str(plan(replace(SEVEN, dtype="float32"), 20.0).refusal)
    assert json.loads(json.dumps(found.to_dict()))["refusal"] == found.refusal


def test_keys_and_values_take_no_more_than_half_of_what_is_left() -> None:
    stages = {stage.name: stage for stage in plan(SEVEN, 14.5).host.stages}
    left = 14.5 * GIB - stages["load"].nbytes
    assert 0 < stages["run"].parts["keys and values"] <= left / 2


def test_a_device_with_memory_of_its_own_takes_none_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    here = plan(SEVEN, 40.0).host
    device(monkeypatch, 140.0)
    there = plan(SEVEN, 40.0).host
    for name in ("weights", "keys and values"):
        assert here.stages[1].parts[name] > 0
        assert there.stages[1].parts[name] == 0
    assert there.stages[1].parts["process"] == here.stages[1].parts["process"]
    assert there.stages[-1] == here.stages[-1]


def test_a_device_has_a_plan_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine would hold of the host's memory it holds of the device's, and transformers' model comes there."""
    host = {stage.name: stage.parts for stage in plan(SEVEN, 40.0).host.stages}
    device(monkeypatch, 40.0)
    found = plan(SEVEN, 40.0)
    assert found.refusal is None
    assert found.device is not None
    stages = {stage.name: stage.parts for stage in found.device.stages}
    assert stages["load"] == {"weights": host["load"]["weights"]}
    assert set(stages["run"]) == {"weights", "keys and values", "step buffers"}
    assert stages["run"]["keys and values"] == host["run"]["keys and values"]
    assert stages["certificate"]["reference"] == host["certificate"]["reference"]
    assert "process" not in stages["certificate"]
    written = json.loads(json.dumps(found.to_dict()))["device"]
    assert (written["allowed_by"], written["allowed_bytes"]) == ("the device", 40 * GIB)
    assert written["planned_peak_bytes"] == found.device.peak.nbytes


def test_a_plan_that_does_not_fit_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much the host has; with room for the engine alone, the reference comes layer by layer."""
    device(monkeypatch, 10.0)
    with pytest.raises(
        ConfigError,
        match=r"stage load needs 12\.\d\d GiB of memory \(.* weights\) and the device allows 10\.00 GiB; free .* more, "
        "or take a smaller model or another --device",
    ):
        plan(SEVEN, 400.0).require_fits()
    device(monkeypatch, 18.0)
    assert plan(SEVEN, 400.0).refusal is None
    assert plan(SEVEN, 400.0).reference == "streamed"
    device(monkeypatch, 140.0)
    assert plan(SEVEN, 400.0).reference == "whole"


def device(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """From here on the backend computes on a device with so much memory of its own free."""
    monkeypatch.setattr(choose_backend("cpu"), "own_memory", lambda device: int(gib * GIB))


def test_the_engine_holds_what_was_planned(tmp_path: Path) -> None:
    llm = LLM(num_threads=1)
    llm.warm_up()
    planned = plan_memory(
        EngineOptions(num_threads=1), llm.config, [(20, 30)] * 40, FreeMemory(8 * GIB, "the machine"), num_threads=1
    )
    parts = planned.host.stages[1].parts
    held = llm._model.memory()
    assert parts["weights"] == held.weights
    assert parts["keys and values"] == llm.describe()["kv_bytes"]
    llm.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A run of a few built-in prompts that was planned with other choices; returns its result."""

    def run_with(**choice: Any) -> dict[str, Any]:
        plan_run = preview.plan_run
        monkeypatch.setattr("isologit.job.run.plan_run", lambda options: replace(plan_run(options), **choice))
        options = RunOptions(
            engine=EngineOptions(num_threads=1),
            output=tmp_path / "out",
            limit=6,
            baseline_requests=2,
            max_new_tokens=12,
        )
        return run_job(options).data

    return run_with


def test_a_streamed_certificate_says_so(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = run(reference="streamed")
    assert result["certificate"]["verdict"] == "VALID"
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert "streamed" in certificate["reference"]["how"]
    assert certificate["noise_floor"]["max_abs"] > 0
    assert result["baseline"]["dtype"] == "float32"
    assert result["memory"]["planned_peak_bytes"] > 0
    assert result["memory"]["peak_bytes"] > 0


def test_a_baseline_in_the_stored_dtype(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = run(reference="streamed", baseline_dtype="bfloat16")
    assert result["baseline"]["dtype"] == "bfloat16"
    assert "bfloat16" in result["baseline"]["what"]
    assert result["certificate"]["verdict"] == "VALID"
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["reference"]["dtype"] == "float32"


def test_the_baselines_model_is_gone_when_the_certificate_begins(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the help of Python's collector, which may not come for long; only so do both fit where either does."""
    loaded: list[weakref.ref[Reference]] = []
    gone: list[bool] = []

    class Watched(Reference):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            loaded.append(weakref.ref(self))

    def load(*arguments: Any) -> Any:
        gone.extend(reference() is None for reference in loaded)
        return load_reference(*arguments)

    monkeypatch.setattr("isologit.job.run.Reference", Watched)
    monkeypatch.setattr("isologit.job.run.load_reference", load)
    gc.disable()
    try:
        run(reference="streamed", baseline_dtype="bfloat16")
    finally:
        gc.enable()
    assert gone == [True]


def test_without_room_for_a_baseline_the_run_still_certifies(run: Callable[..., dict[str, Any]]) -> None:
    result = run(reference="streamed", baseline_dtype=None, no_baseline="no baseline will be timed: no room")
    assert result["baseline"] is None
    assert result["no_baseline"] == "no baseline will be timed: no room"
    assert result["certificate"]["verdict"] == "VALID"


def test_a_request_is_planned_for_the_whole_context(tmp_path: Path) -> None:
    """Linear scaling stretches it; what is longer than that is refused as the engine refuses it."""
    shape = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "torch_dtype": "float32",
    }  # fmt: skip
    config, prompts = tmp_path / "config.json", tmp_path / "prompts.jsonl"
    config.write_text(json.dumps(shape))
    engine = EngineOptions(model=str(config), load_format="dummy")

    def planned(num_prompt_tokens: int) -> MemoryPlan:
        prompts.write_text(json.dumps({"prompt_token_ids": [3] * num_prompt_tokens, "max_new_tokens": 8}))
        return preview.plan_run(RunOptions(engine=engine, dataset=prompts))

    assert planned(120).refusal is None
    with pytest.raises(DatasetError, match="request 0: This model's maximum context length is 128 tokens"):
        planned(121)
