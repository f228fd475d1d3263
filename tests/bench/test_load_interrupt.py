"""Whatever ends a load run, its file is there: with what was answered, marked INVALID."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.bench.fake_server import FakeServer, fake_server

from isologit.common.signals import interrupts_deferred

BENCH = (sys.executable, "-m", "isologit", "bench")


def _interrupt(server: FakeServer, number: signal.Signals, folder: Path, *arguments: str) -> tuple[int, str]:
    """Start the command, send the signal once ten requests are there; exit code and what it said."""
    command = [*BENCH, *arguments, "--port", str(server.port), "--num-warmups", "0", "--result-dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while len(server.bodies) < 10:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
            time.sleep(0.3)
            process.send_signal(number)
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_what_was_answered(number: signal.Signals, tmp_path: Path) -> None:
    with fake_server(token_s=0.01) as server:
        code, said = _interrupt(
            server, number, tmp_path,
            "serve", "-X", "20", "-T", "600", "-O", str(tmp_path / "contest"), "--save-detailed",
        )  # fmt: skip
    assert code == 130, said
    (path,) = tmp_path.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["verdict"] == "INVALID"
    assert found["reasons"][0]["code"] == "interrupted"
    assert 0 < found["completed"] < found["issued"] == 12000
    assert found["statuses"].count("completed") == found["completed"]
    assert found["statuses"].count("unsent") > 11000
    assert found["mean_ttft_ms"] > 0
    assert {"interrupted" in error for error in found["errors"] if error} == {True}
    answered = json.loads((tmp_path / "contest" / "result_20.0_x.json").read_text())
    assert len(answered) == found["completed"]
    assert "INVALID" in said
    assert str(path) in said
    assert "Traceback" not in said


def test_a_sweep_keeps_the_rate_it_was_at_and_begins_no_other(tmp_path: Path) -> None:
    with fake_server(token_s=0.01) as server:
        code, said = _interrupt(
            server, signal.SIGINT, tmp_path, "sweep", "--request-rates", "20,40", "--num-prompts", "1500"
        )
    assert code == 130, said
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert (found["request_rate"], found["verdict"]) == (20.0, "INVALID")


def test_a_signal_behind_the_run_waits_for_the_file() -> None:
    done = []

    def finish() -> None:
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("written")

    with pytest.raises(KeyboardInterrupt):
        finish()
    assert done == ["written"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
