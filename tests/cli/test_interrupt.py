"""A run stopped in any way keeps what is complete; `--resume` finishes it without redoing or losing a request."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.cli.conftest import Invoke, read_jsonl, write_jsonl

from isologit.job.folder import PARTIAL_OUTPUTS, RESULT

NUM_REQUESTS = 160


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough work, on two slots, for a signal to arrive in the middle."""
    return write_jsonl(
        tmp_path_factory.mktemp("many") / "many.jsonl",
        *(
            {"id": f"r{i}", "prompt": f"Count from {i % 20 + 1} to 90.\n", "max_new_tokens": 20 + i % 50}
            for i in range(NUM_REQUESTS)
        ),
    )


def arguments(many: Path, out: Path) -> list[str]:
    return [
        "run", "--dataset", str(many), "--output", str(out), "--max-num-seqs", "2", "--baseline-requests", "0",
        "--speculative-tokens", "0", "--capture-seed", "7",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    command = [sys.executable, "-m", "isologit", *arguments(many, out), "--threads", "1", "--json"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    return {line["id"]: line["token_ids"] for line in read_jsonl(out / "outputs.jsonl")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_is_resumed(
    number: signal.Signals, many: Path, uninterrupted: dict[str, list[int]], invoke: Invoke, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "isologit", *arguments(many, out), "--threads", "1"], stderr=subprocess.PIPE, text=True
    )
    partial = out / PARTIAL_OUTPUTS
    deadline = time.monotonic() + 200
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert not (out / RESULT).exists()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130
        assert f"of {NUM_REQUESTS} requests are complete and kept" in stderr
        assert "--resume" in stderr
    kept = {line["request_id"] for line in map(json.loads, partial.read_text().splitlines()[:-1])}
    assert 0 < len(kept) < NUM_REQUESTS

    assert invoke(*arguments(many, out)).exit_code == 2  # never overwritten without --resume
    assert "begun with" in invoke(*arguments(many, out), "--resume", "--limit", 3).stderr
    done = invoke(*arguments(many, out), "--resume", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0, found
    assert found["certificate"]["verdict"] == "VALID"
    assert len(found["segments"]) == 2
    lines = read_jsonl(out / "outputs.jsonl")
    assert {line["id"]: line["token_ids"] for line in lines} == uninterrupted
    assert not kept & {line["id"] for line in lines if line["segment"] == 1}  # nothing is done twice
    assert not list(out.glob("*partial*"))


def test_nothing_is_left_when_nothing_was_complete(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "isologit", *arguments(many, out), "--threads", "1"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "loading the model ...\n" in iter(process.stderr.readline, "")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not out.exists()
