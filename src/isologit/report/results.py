"""The result files of a run as the page needs them.

Owns the reading of `outputs.jsonl` and `steps.jsonl` line by line and of the two JSON objects. Any file or key may be
missing (a run without a certificate, an interrupted run): what depends on it is then empty or None, never an error. It
does not know how the page looks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isologit.errors import OutputFolderError
from isologit.report.svg import Floats

_TIMES = ("arrival_s", "scheduled_s", "first_token_s", "finished_s")
_NUM_SAMPLES = 8
_MAX_PREVIEW = 1200  # characters of a prompt or text on the page


@dataclass(frozen=True, slots=True)
class Steps:
    """What each engine step did; arrays are [steps]."""

    start_s: Floats
    end_s: Floats
    num_seqs: Floats
    num_tokens: Floats


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each completed request was where; arrays are [requests], seconds since the run began."""

    ids: list[str]
    arrival_s: Floats
    scheduled_s: Floats
    first_token_s: Floats
    finished_s: Floats


@dataclass(frozen=True, slots=True)
class Preview:
    """A request as text: the beginning of its prompt and of its output, or its error."""

    request_id: str
    prompt: str
    text: str
    note: str


@dataclass(slots=True)
class Outputs:
    """`outputs.jsonl`, read once, line by line."""

    timeline: Timeline | None = None
    samples: list[Preview] = field(default_factory=list)
    failed: list[Preview] = field(default_factory=list)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no such file.

    Raises OutputFolderError when the file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputFolderError(f"{path} is not readable JSON ({error}); run the job again") from error
    if not isinstance(found, dict):
        raise OutputFolderError(f"{path} does not hold a JSON object; run the job again")
    return found


def dig(thing: Mapping[str, Any], path: str) -> Any:
    """`dig(d, "a.b")` is `d["a"]["b"]`, or None where something is missing."""
    found: Any = thing
    for key in path.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def read_steps(path: Path) -> Steps | None:
    """Steps of the timed run, or None without a single whole line."""
    rows = [
        [float(line[key]) for key in ("start_s", "end_s", "num_seqs", "num_tokens")]
        for line in _lines(path)
        if "end_s" in line
    ]
    if not rows:
        return None
    columns = np.array(rows).T
    return Steps(*columns)


def read_outputs(path: Path) -> Outputs:
    """Times of all completed requests, the failed ones, and some samples spread evenly over the file."""
    outputs = Outputs()
    ids: list[str] = []
    times: list[list[float]] = []
    completed: list[Preview] = []
    for line in _lines(path):
        preview = _preview(line)
        if line.get("error"):
            outputs.failed.append(preview)
            continue
        completed.append(preview)
        metrics = line.get("metrics") or {}
        moments = [float(metrics[key]) for key in _TIMES if metrics.get(key) is not None]
        if len(moments) == len(_TIMES):
            ids.append(preview.request_id)
            times.append(moments)
    if times:
        outputs.timeline = Timeline(ids, *np.array(times).T)
    chosen = np.unique(np.linspace(0, len(completed) - 1, min(_NUM_SAMPLES, len(completed))).astype(int))
    outputs.samples = [completed[i] for i in chosen]
    return outputs


def _preview(line: Mapping[str, Any]) -> Preview:
    error = line.get("error")
    tokens = line.get("token_ids") or []
    note = str(error) if error else f"{len(tokens)} tokens · ended by {line.get('finish_reason', 'unknown')}"
    prompt = line.get("prompt")
    if prompt is None:
        prompt = f"token ids {line.get('prompt_token_ids') or []}"
    return Preview(str(line.get("id", "")), _cut(str(prompt)), _cut(str(line.get("text") or "")), note)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_PREVIEW else text[:_MAX_PREVIEW] + " …"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole JSON objects of a file; the torn last line of an interrupted run is passed over."""
    if not path.exists():
        return []
    found = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                found.append(entry)
    return found
