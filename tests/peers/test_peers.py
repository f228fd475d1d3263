"""The figures of the benchmark beside the peers: limit, medians, agreement, and the grids of settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers import mlas_avx2, systems
from benchmarks.peers.limits import least_seconds, step_rows
from benchmarks.peers.systems import SYSTEMS, settings_for
from benchmarks.peers.table import agreement, summarise
from benchmarks.peers.workloads import WORKLOADS, random_requests, workload_file

from isologit.config import PRESETS
from isologit.job.machine import MachineLimits

CONFIG = PRESETS["llama-110m"]


def test_steps_compute_every_token_once_and_every_output_token_has_logits() -> None:
    lengths = WORKLOADS["trace300"].lengths()
    for slots in (1, 7, 64, 1000):
        steps = step_rows(lengths, slots)
        assert sum(tokens for tokens, _ in steps) == sum(prompt + output - 1 for prompt, output in lengths)
        assert sum(logits for _, logits in steps) == sum(output for _, output in lengths)
        assert max(logits for _, logits in steps) <= slots


def test_steps_of_two_slots_start_the_longest_first() -> None:
    assert step_rows([(5, 1), (3, 4), (2, 2)], slots=2) == [(5, 2), (2, 2), (6, 2), (1, 1)]


def test_one_request_is_bound_by_streaming_and_a_long_prompt_by_products() -> None:
    rates = MachineLimits(flops=200e9, tile_flops=400e9, bytes_per_s=20e9)
    stream_s = CONFIG.num_matmul_parameters * 4 / rates.bytes_per_s
    alone = least_seconds(CONFIG, [(1, 100)], rates, bytes_per_weight=4)
    assert alone["limit_s"] == pytest.approx(100 * stream_s)
    prompt = least_seconds(CONFIG, [(2048, 1)], rates, bytes_per_weight=4)
    assert prompt["limit_s"] == pytest.approx(prompt["flop"] / rates.flops)
    assert prompt["limit_s"] > stream_s
    assert prompt["tile_limit_s"] == pytest.approx(prompt["limit_s"] / 2)


def test_weights_of_two_bytes_halve_the_limit_of_one_request() -> None:
    rates = MachineLimits(flops=200e9, tile_flops=400e9, bytes_per_s=20e9)
    four = least_seconds(CONFIG, [(1, 100)], rates, bytes_per_weight=4)["limit_s"]
    assert least_seconds(CONFIG, [(1, 100)], rates, bytes_per_weight=2)["limit_s"] == pytest.approx(four / 2)


def test_summary_has_medians_and_ratios_to_this_engine() -> None:
    runs = [
        *({"system": "isologit", "seconds": s} for s in (9.0, 2.0, 1.0)),
        *({"system": "vllm", "seconds": s} for s in (6.0, 4.0)),
    ]
    summary = summarise(runs, limits=[{"limit_s": s, "tile_limit_s": s / 2} for s in (1.0, 1.0, 7.0)])
    assert summary["isologit"] == {
        "median_s": 2.0,
        "least_s": 1.0,
        "most_s": 9.0,
        "limit_over_time": 0.5,
        "tile_limit_over_time": 0.25,
        "times_isologit": 1.0,
    }
    assert summary["vllm"]["times_isologit"] == 2.5


def test_agreement_looks_at_the_first_tokens_only() -> None:
    ours = [[1] * 20, [2] * 20]
    assert agreement([[1] * 8 + [9] * 12, [2] * 20], ours) == 1.0
    assert agreement([[1] * 7 + [9] * 13, [2] * 20], ours) == 0.5


def test_warm_up_shares_no_prompt_with_the_requests() -> None:
    workload = WORKLOADS["tiny64"]
    lengths = workload.lengths()
    file = workload_file(workload, lengths, seed=0)
    assert [(len(r["prompt_token_ids"]), r["max_tokens"]) for r in file["requests"]] == lengths
    prompts = {tuple(request["prompt_token_ids"]) for request in file["requests"]}
    assert prompts.isdisjoint(tuple(request["prompt_token_ids"]) for request in file["warm_up"])
    assert file["requests"] == random_requests(lengths, 32000, seed=0) != random_requests(lengths, 32000, seed=1)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_an_adapter_and_different_settings_to_try(name: str) -> None:
    system = SYSTEMS[name]
    assert system.adapter.is_file()
    for num_requests in (1, 300):
        grid = system.grid(num_requests)
        assert grid
        assert all(grid.count(settings) == 1 for settings in grid)


def test_kept_to_avx2_a_system_has_the_variables_and_the_environment_for_it() -> None:
    openvino = SYSTEMS["openvino"]
    assert not openvino.variables
    kept = openvino.narrowed()
    assert kept.variables["OV_CPU_MAX_ISA"] == "AVX2"
    assert kept.python != openvino.python
    assert SYSTEMS["isologit"].narrowed().variables["ISOLOGIT_VECTOR_WIDTH"] == "8"
    with pytest.raises(ValueError, match="AVX-512"):
        SYSTEMS["llamacpp"].narrowed()


def test_settings_found_with_avx2_win_over_those_found_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(slots: int) -> dict[str, Any]:
        return {"openvino": {"settings": {"max_num_seqs": slots}}}

    monkeypatch.setattr(systems, "TUNED", tmp_path / "tuned.json")
    openvino = SYSTEMS["openvino"]
    assert settings_for(openvino, "trace300", 300, "avx2")[1] == "default"
    systems.TUNED.write_text(json.dumps({"trace300": found(32)}))
    assert settings_for(openvino, "trace300", 300) == ({"max_num_seqs": 32}, "tuned")
    assert settings_for(openvino, "trace300", 300, "avx2") == ({"max_num_seqs": 32}, "tuned without avx2")
    systems.TUNED.write_text(json.dumps({"trace300": found(32), "trace300-avx2": found(16)}))
    assert settings_for(openvino, "trace300", 300, "avx2") == ({"max_num_seqs": 16}, "tuned")


def test_mlas_answers_no_to_avx512_in_one_known_place(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="install openvino"):
        mlas_avx2.main(tmp_path)
    plugin = tmp_path / "lib/python3.11/site-packages/openvino/libs/libopenvino_intel_cpu_plugin.so"
    plugin.parent.mkdir(parents=True)
    plugin.write_bytes(b"another plugin")
    with pytest.raises(SystemExit, match="not the one"):
        mlas_avx2.main(tmp_path)
    before = b"code " + bytes.fromhex("41f7c1000001000f84") + b" more"
    plugin.write_bytes(before)
    for _ in range(2):  # a second time changes nothing
        mlas_avx2.main(tmp_path)
        after = plugin.read_bytes()
        assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [10]
