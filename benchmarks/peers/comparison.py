"""Interleaved runs of the systems on one workload, beside the machine's limit, and the search for settings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.limits import least_seconds, measure_rates
from benchmarks.peers.models import model_folder
from benchmarks.peers.processes import RunFailedError, run_system
from benchmarks.peers.systems import SYSTEMS, TUNED, Settings, System, settings_for, tuned_as
from benchmarks.peers.table import OURS, agreement, markdown, summarise
from benchmarks.peers.workloads import Lengths, Workload, workload_file

from isologit.common.environment import describe_environment
from isologit.common.files import write_json
from isologit.config import PRESETS

# Requests that a sequential and a slow system run; their time is scaled by output tokens.
_SEQUENTIAL_REQUESTS, _SLOW_REQUESTS = 20, 60
_BYTES = {"float32": 4, "float16": 2}

Say = Callable[[str], None]


@dataclass
class Comparison:
    """One workload, the systems and how often; `result` is what has happened so far."""

    workload: Workload
    systems: Sequence[System]
    lengths: Lengths
    repeats: int
    seed: int
    dtype: str
    once: frozenset[str]  # systems that run in the first repeat only
    timeout_s: float
    say: Say
    isa: str | None = None  # the instruction set that all are kept to, None: what each finds
    result: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.model_dir = model_folder(self.workload.preset, seed=self.seed, dtype=self.dtype)
        self.file = workload_file(self.workload, self.lengths, self.seed)
        self._settings: dict[str, Settings] = {}
        described = {}
        for system in self.systems:
            settings, source = settings_for(system, self.workload.name, len(self.lengths), self.isa)
            self._settings[system.name] = settings
            described[system.name] = {
                "label": system.label,
                "version": None,
                "settings": settings,
                "settings_from": source,
                "variables": system.variables,
                "measured_requests": len(part) if (part := self._part(system)) is not None else None,
            }
        self.result = {
            "benchmark": "peers",
            "workload": {
                "name": self.workload.name,
                "what": self.workload.what,
                "preset": self.workload.preset,
                "dtype": self.dtype,
                "requests": len(self.lengths),
                "prompt_tokens": sum(prompt for prompt, _ in self.lengths),
                "output_tokens": sum(output for _, output in self.lengths),
            },
            "isa": self.isa,
            "seed": self.seed,
            "repeats": self.repeats,
            "environment": describe_environment(),
            "systems": described,
            "limits": [],
            "runs": [],
            "failures": [],
            "summary": {},
        }

    def run(self, output: Path) -> None:
        """Run every system `repeats` times in turn; `output` (JSON) and its `.md` are rewritten after each run."""
        config = PRESETS[self.workload.preset]
        ours: list[list[int]] | None = None
        systems = list(self.systems)
        for repeat in range(self.repeats):
            rates = measure_rates(SYSTEMS[OURS].narrowed().variables if self.isa else {})
            self.result["limits"].append(least_seconds(config, self.lengths, rates, _BYTES[self.dtype]))
            for system in systems.copy():
                if repeat and system.name in self.once:
                    continue
                self.say(f"repeat {repeat + 1} of {self.repeats}: {system.label} ...")
                part = self._part(system)
                try:
                    done = run_system(
                        system, self._only(part), self.model_dir, self._settings[system.name], self.timeout_s
                    )
                except RunFailedError as error:
                    self.result["failures"].append({"system": system.name, "repeat": repeat, "reason": str(error)})
                    self.say(f"    {error}")
                    systems.remove(system)
                    continue
                if system.name == OURS:
                    ours = done["output_token_ids"]
                self._record(system, repeat, part, done, ours)
                self._save(output)
            systems = systems[1:] + systems[:1]  # so that none always follows the same one
        self._save(output)

    def _record(
        self,
        system: System,
        repeat: int,
        part: list[int] | None,
        done: dict[str, Any],
        ours: list[list[int]] | None,
    ) -> None:
        outputs = done.pop("output_token_ids")
        measured = sum(len(output) for output in outputs)
        seconds = done["total_s"] * self.result["workload"]["output_tokens"] / measured
        same = None
        if ours is not None:
            same = agreement(outputs, ours if part is None else [ours[i] for i in part])
        self.result["runs"].append(
            {"system": system.name, "repeat": repeat, "seconds": seconds, "agreement": same, **done}
        )
        self.result["systems"][system.name]["version"] = next(
            value for name, value in done["versions"].items() if name != "python"
        )
        self.say(f"    {seconds:.2f} s")

    def _save(self, output: Path) -> None:
        if self.result["runs"]:
            self.result["summary"] = summarise(self.result["runs"], self.result["limits"])
        write_json(output, self.result)
        output.with_suffix(".md").write_text(markdown(self.result))

    def tune(self) -> None:
        """Run every setting of each system's grid once and keep the fastest in `tuned.json` for this workload."""
        for system in self.systems:
            tried: list[dict[str, Any]] = []
            for settings in system.grid(len(self.lengths)):
                self.say(f"{system.label}: {json.dumps(settings)} ...")
                try:
                    done = run_system(system, self._only(self._part(system)), self.model_dir, settings, self.timeout_s)
                except RunFailedError as error:
                    self.say(f"    {error}")
                    continue
                tried.append({"settings": settings, "seconds": done["total_s"]})
                self.say(f"    {done['total_s']:.2f} s")
            if tried:
                best = min(tried, key=lambda trial: trial["seconds"])["settings"]
                _remember(
                    tuned_as(self.workload.name, self.isa),
                    system.name,
                    {"settings": best, "requests": len(self.lengths), "tried": tried},
                )

    def _part(self, system: System) -> list[int] | None:
        """Indices of the requests a slow system runs, evenly spread over their lengths; None for all."""
        count = len(self.lengths)
        most = _SEQUENTIAL_REQUESTS if system.sequential else _SLOW_REQUESTS if system.slow else count
        if count <= most:
            return None
        by_length = sorted(range(count), key=lambda i: self.lengths[i][1])
        return [by_length[(2 * k + 1) * count // (2 * most)] for k in range(most)]

    def _only(self, part: list[int] | None) -> dict[str, Any]:
        if part is None:
            return self.file
        return {**self.file, "requests": [self.file["requests"][i] for i in part]}


def _remember(workload: str, system: str, found: dict[str, Any]) -> None:
    tuned = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    tuned.setdefault(workload, {})[system] = found
    write_json(TUNED, tuned)


def say_with_time(text: str) -> None:
    """Progress with the clock, one line each."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
