"""One run of one system in a process of its own, so that no thread pool or cache of one reaches another."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.systems import Settings, System

# Each system chooses its own thread count on all cores, and nothing may ask a hub for files.
_UNSET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_SET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_LOG_LINES = 3


class RunFailedError(Exception):
    """A system did not finish its requests; the message is one line."""


def run_system(
    system: System, workload: dict[str, Any], model_dir: Path, settings: Settings, timeout_s: float
) -> dict[str, Any]:
    """What the adapter wrote, see `adapters/contract.py`. `workload` holds `requests` and `warm_up`.

    Raises RunFailedError when the system is not installed, fails, takes longer than `timeout_s` seconds with its
    loading, or gives an output of another length than asked for.
    """
    if not system.is_installed:
        raise RunFailedError(f"not installed; run benchmarks/peers/setup.sh {system.environment}")
    environment = {name: value for name, value in os.environ.items() if name not in _UNSET} | _SET | system.variables
    with tempfile.TemporaryDirectory() as folder:
        given, written, log = Path(folder, "workload.json"), Path(folder, "result.json"), Path(folder, "log")
        given.write_text(json.dumps({**workload, "model_dir": str(model_dir), "settings": settings}))
        with log.open("w") as stream:
            try:
                done = subprocess.run(
                    [system.python, system.adapter, given, written],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    timeout=timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise RunFailedError(f"not finished after {timeout_s:.0f} s") from None
        if done.returncode:
            last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:])
            raise RunFailedError(f"exit code {done.returncode}: {last}")
        result: dict[str, Any] = json.loads(written.read_text())
    given_lengths = [len(output) for output in result["output_token_ids"]]
    if given_lengths != [request["max_tokens"] for request in workload["requests"]]:
        raise RunFailedError("some outputs have another length than asked for")
    return result
