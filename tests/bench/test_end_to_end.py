"""The archived procedure with real processes: a server, its warm-up, the load, and what a killed server leaves."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from isologit.common.processes import ServerProcess, server_process

ISOLOGIT = (sys.executable, "-m", "isologit")
NUM_REQUESTS = 60


@contextmanager
def served() -> Iterator[tuple[ServerProcess, int]]:
    """A server process and its port."""
    with server_process([*ISOLOGIT, "serve", "--port", "0", "--threads", "1"], stop_s=5) as server:
        yield server, int(server.url.rpartition(":")[2])


def isologit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ISOLOGIT, *arguments], capture_output=True, text=True, timeout=120, check=False)


def answered(port: int) -> float:
    """How many requests the server has answered, by its own count."""
    lines = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total{"))


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_archived_procedure_gives_the_offline_runs_texts(tmp_path: Path) -> None:
    with served() as (server, port):
        warm_up = requests.post(
            f"http://127.0.0.1:{port}/models/llama2/generate",
            json={
                "inputs": "I love Beijing, because",
                "parameters": {"max_new_tokens": 16, "do_sample": "True", "return_full_text": "True"},
                "stream": "True",
            },
            timeout=60,
        )
        assert warm_up.json()["generated_text"]
        done = isologit(
            "bench", "serve", "-X", "150", "-T", "0.4", "-P", str(port), "-O", str(tmp_path), "--contest-arrivals",
            "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "load.json",
        )  # fmt: skip
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert "All Tasks Done; Exec Time is " in done.stdout, done.stdout + done.stderr
    load = json.loads((tmp_path / "load.json").read_text())
    assert load["completed"] == load["issued"] == NUM_REQUESTS
    assert load["verdict"] in ("VALID", "NOT CERTIFIED")  # a busy machine may make the generator late
    assert done.returncode == (load["verdict"] != "VALID")

    quick = ("--baseline-requests", "0", "--capture-rows", "1", "--certify-seconds", "1", "--threads", "1")
    offline = isologit("run", "--limit", str(NUM_REQUESTS), "--output", str(tmp_path / "run"), *quick)
    assert offline.returncode == 0, offline.stderr
    outputs = json_lines(tmp_path / "run" / "outputs.jsonl")
    texts = {output["id"]: output["text"] for output in outputs}
    assert dict(zip(load["request_ids"], load["generated_texts"], strict=True)) == texts
    contest = json.loads((tmp_path / "result_150.0_x.json").read_text())
    pairs = sorted((one["input"], one["resp_text"]) for one in contest)
    assert pairs == sorted((output["prompt"], output["text"]) for output in outputs)


def test_a_killed_server_ends_the_load_within_seconds(tmp_path: Path) -> None:
    with served() as (server, port):
        killed_at = []

        def kill() -> None:
            while answered(port) < 10:
                time.sleep(0.05)
            killed_at.append(time.monotonic())
            server.send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        done = isologit("bench", "serve", "-X", "50", "-T", "60", "-P", str(port), "-O", str(tmp_path))
        took = time.monotonic() - killed_at[0]
        killer.join()
    assert done.returncode == 1
    assert took < 10
    assert "INVALID" in done.stdout
    assert "server_gone: " in done.stdout
    assert "All Tasks Done" not in done.stdout
    assert len(json.loads((tmp_path / "result_50.0_x.json").read_text())) < 3000


def test_a_sweep_starts_and_stops_real_servers_and_is_drawn_from_its_files(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = f"{sys.executable} -m isologit serve --port {port} --threads 1"
    done = isologit(
        "bench", "sweep", "--backend", "tgi", "--request-rates", "50,inf", "--num-prompts", "10", "--port", port,
        "--server-command", command, "--result-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    found = [json.loads(path.read_text()) for path in tmp_path.glob("tgi-*.json")]
    assert [one["completed"] for one in found] == [10, 10]
    assert len({one["hashes"]["texts"] for one in found}) == 1  # the rate changed no answer
    assert (tmp_path / "server.log").read_text().count("serving ") == 2
    assert isologit("report", str(tmp_path)).returncode == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for plot in ("throughput", "latency", "knee", "cdf", "timeline-0", "concurrency-1", "gaps-0"):
        assert f'"figure-{plot}"' in page
