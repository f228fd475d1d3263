"""The whole job over every backend: its certificate is VALID, and its memory was planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isologit.config import EngineOptions
from isologit.job.options import RunOptions
from isologit.job.run import run_job


def test_the_default_job_is_valid(backend_name: str, tmp_path: Path) -> None:
    if backend_name == "cpu":
        pytest.skip("tests/cli and tests/job run it on the CPU's backend")
    engine = EngineOptions(backend=backend_name, num_threads=1, max_num_seqs=8)
    result = run_job(RunOptions(engine=engine, limit=8, output=tmp_path / "run", baseline_requests=2))
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert result.valid, certificate["statement"]
    assert certificate["verdict"] == "VALID"
    assert result.data["engine"]["backend"] == backend_name
