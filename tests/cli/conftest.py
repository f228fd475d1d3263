"""Runs of the command line inside the test's own process, and the files they are given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from isologit.cli.app import app
from isologit.workload import demo_model_path

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """`isologit` with these arguments; one thread, so that tests do not fight for cores."""

    def run(*args: object) -> Result:
        words = [str(arg) for arg in args]
        if words[:1] == ["run"]:
            words += ["--threads", "1"]
        return CliRunner().invoke(app, words)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model that a test may spoil."""
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder)
    return folder


def write_jsonl(file: Path, *records: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Twelve requests of different lengths."""
    texts = ["Count from 3 to 20.\n", "List 4 tools.\n", "Describe the fox.\n"]
    return write_jsonl(
        tmp_path / "prompts.jsonl",
        *({"id": f"r{i}", "prompt": texts[i % 3], "max_new_tokens": 4 + 3 * i} for i in range(12)),
    )
