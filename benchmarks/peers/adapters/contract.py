"""What every adapter does: read the workload, load, warm up, run against the clock, write what happened.

    python run_NAME.py WORKLOAD.json RESULT.json

Only the standard library may be imported here: each adapter runs in its own system's environment. The workload file is
`{"model_dir", "requests": [{"prompt_token_ids", "max_tokens"}], "warm_up": [...], "settings": {...}}`. The result file
is `{"load_s", "warm_up_s", "total_s", "output_token_ids": [[...]], "peak_memory_bytes", "versions", "settings",
"engine", "certificate"}`, outputs in the order of the requests, each exactly `max_tokens` long: greedy, no end token.
Conversion to the system's own format is not timed, and neither is what this engine says of its run and its proof.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """Prompt token ids and how many tokens must come out."""

    prompt_token_ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Job:
    """What an adapter loads its system for. `settings` are the system's own, see `systems.py`."""

    model_dir: Path
    requests: list[Request]
    settings: dict[str, Any]
    threads: int

    @property
    def max_length(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(request.prompt_token_ids) + request.max_tokens for request in self.requests)

    @property
    def model_config(self) -> dict[str, Any]:
        """The Hugging Face `config.json`."""
        config: dict[str, Any] = json.loads((self.model_dir / "config.json").read_text())
        return config


Generate = Callable[[Sequence[Request]], list[list[int]]]
"""Runs requests and returns their output token ids, in the same order."""


def adapt(
    load: Callable[[Job], Generate],
    packages: Sequence[str],
    convert: Callable[[Job], None] | None = None,
    describe: Callable[[], dict[str, Any]] | None = None,
    certify: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Be an adapter: the whole of a run. `packages` are the distributions whose versions are recorded.

    `describe` and then `certify` are called after the last run: what the engine says of it, and whether its outputs
    are the reference's.
    """
    workload = json.loads(Path(sys.argv[1]).read_text())
    requests = [Request(**request) for request in workload["requests"]]
    warm_up = [Request(**request) for request in workload["warm_up"]]
    job = Job(Path(workload["model_dir"]), requests, workload["settings"], len(os.sched_getaffinity(0)))
    if convert is not None:
        convert(job)
    started = time.perf_counter()
    generate = load(job)
    loaded = time.perf_counter()
    generate(warm_up)
    warm = time.perf_counter()
    outputs = generate(requests)
    finished = time.perf_counter()
    result = {
        "load_s": loaded - started,
        "warm_up_s": warm - loaded,
        "total_s": finished - warm,
        "output_token_ids": [[int(token) for token in output] for output in outputs],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "settings": job.settings,
        "engine": None if describe is None else describe(),
        "certificate": None if certify is None else certify(),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
    os._exit(0)  # threads a system leaves behind would keep the process alive


def converted(job: Job, suffix: str, write: Callable[[Path], None]) -> Path:
    """The model in a system's own format beside the Hugging Face folder, written by `write` when it is missing."""
    target = job.model_dir.with_name(f"{job.model_dir.name}-{suffix}")
    if not target.exists():
        unfinished = target.with_name(f"{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        write(unfinished)
        unfinished.rename(target)
    return target


def order_of(requests: Sequence[Request], order: str) -> Iterator[int]:
    """Indices of the requests, "longest-first" by output (then prompt) or as "given"."""
    indices = range(len(requests))
    if order == "given":
        return iter(indices)
    if order != "longest-first":
        raise ValueError(f'order "{order}" is unknown; use "longest-first" or "given"')
    return iter(sorted(indices, key=lambda i: (-requests[i].max_tokens, -len(requests[i].prompt_token_ids))))


def in_given_order(order: Sequence[int], outputs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Undo `order`: `outputs[k]` belongs to request `order[k]`."""
    restored: list[list[int]] = [[] for _ in order]
    for index, output in zip(order, outputs, strict=True):
        restored[index] = list(output)
    return restored
