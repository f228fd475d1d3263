"""A request that fails while running does not take the others with it: all files, INVALID with the reason, exit 1."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isologit import LLM, GenerationRequest, RequestOutput
from isologit.config import EngineOptions
from isologit.job.options import RunOptions
from isologit.job.run import RunInterrupted, run_job

WHY = "the model produced NaN logits"


class FailsOnce(LLM):
    """Gives up request r1 after its third token."""

    failing = ("r1",)

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[RequestOutput]:
        for output in super().run(requests):
            if output.request_id in self.failing:
                kept = {index: row for index, row in output.captured.items() if index < 3}
                output = replace(
                    output, finish_reason="error", error=WHY, token_ids=output.token_ids[:3], captured=kept
                )
            yield output


class FailsAlways(FailsOnce):
    failing = ("r0", "r1", "r2", "r3")


class StopsEarly(FailsOnce):
    """Is interrupted after three outputs."""

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[RequestOutput]:
        for count, output in enumerate(super().run(requests)):
            if count == 3:
                raise KeyboardInterrupt
            yield output


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    file = tmp_path / "prompts.jsonl"
    texts = ["Count from 3 to 20.\n", "List 6 tools.\n", "Describe the fox.\n", "Describe the owl.\n"]
    lines = [{"id": f"r{i}", "prompt": text, "max_new_tokens": 12} for i, text in enumerate(texts)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    engine = EngineOptions(num_threads=1)
    return RunOptions(engine=engine, dataset=file, output=tmp_path / "out", baseline_requests=2, capture_rows=40)


def files(options: RunOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lines of outputs.jsonl by id, and certificate.json."""
    assert options.output is not None
    lines = [json.loads(line) for line in (options.output / "outputs.jsonl").read_text().splitlines()]
    return {line["id"]: line for line in lines}, json.loads((options.output / "certificate.json").read_text())


def test_the_others_finish_and_the_run_is_invalid(options: RunOptions) -> None:
    result = run_job(options, engine_factory=lambda engine, _: FailsOnce(options=engine))
    assert not result.valid
    assert result.num_failed == 1
    lines, certificate = files(options)
    assert (lines["r1"]["finish_reason"], lines["r1"]["error"]) == ("error", WHY)
    assert all(lines[name]["finish_reason"] in ("length", "stop") for name in ("r0", "r2", "r3"))
    assert [reason["code"] for reason in certificate["reasons"]] == ["failed_requests"]
    assert "r1" in certificate["reasons"][0]["message"]
    assert certificate["requests"]["rescored"] == 3
    assert result.data["baseline"]["of"] == 3


def test_a_resume_keeps_the_failure_and_finishes_the_rest(options: RunOptions) -> None:
    with pytest.raises(RunInterrupted):
        run_job(options, engine_factory=lambda engine, _: StopsEarly(options=engine))
    result = run_job(replace(options, resume=True), engine_factory=lambda engine, _: FailsOnce(options=engine))
    assert not result.valid
    lines, certificate = files(options)
    assert set(lines) == {"r0", "r1", "r2", "r3"}
    assert lines["r1"]["error"] == WHY
    assert [reason["code"] for reason in certificate["reasons"]] == ["failed_requests"]


def test_when_all_fail_the_files_are_there_all_the_same(options: RunOptions) -> None:
    result = run_job(options, engine_factory=lambda engine, _: FailsAlways(options=engine))
    assert not result.valid
    lines, certificate = files(options)
    assert {line["error"] for line in lines.values()} == {WHY}
    assert [reason["code"] for reason in certificate["reasons"]] == ["failed_requests", "no_captured_rows"]
    assert result.data["baseline"] is None
