"""What an interrupted run must remember: what it was, its secret seed, and how long each of its segments took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isologit.errors import OutputFolderError
from isologit.job.folder import STATE, OutputFolder


@dataclass
class Segment:
    """One uninterrupted stretch of inference. inference_s is None until it ended in a way that could be recorded."""

    started_at: str
    preprocess_s: float
    inference_s: float | None = None
    ended: str = "killed"


@dataclass
class RunState:
    """identity: everything that must be the same for a run to be continued."""

    identity: dict[str, Any]
    capture_seed: int
    segments: list[Segment] = field(default_factory=list)

    def save(self, folder: OutputFolder) -> None:
        """Replace the state in the folder."""
        folder.write_json(STATE, asdict(self))

    def require_same(self, identity: Mapping[str, Any], folder: Path) -> None:
        """Raises OutputFolderError naming the first thing that differs from the interrupted run."""
        for name in sorted({*identity, *self.identity}):
            was, now = self.identity.get(name), identity.get(name)
            if was != now:
                raise OutputFolderError(
                    f"{folder}: was begun with {name} {_short(was)}, not {_short(now)}; "
                    "resume with the same command, or choose another folder"
                )

    def close_segments(self, steps: list[dict[str, Any]], metrics: list[tuple[int, float]]) -> None:
        """Give segments that were killed the time of the last thing known of them.

        steps: with `segment` and `end_s`. metrics: (segment, finished_s) of every finished request.
        """
        ends = [(step["segment"], step["end_s"]) for step in steps] + metrics
        for number, segment in enumerate(self.segments):
            if segment.inference_s is None:
                segment.inference_s = max((end for of, end in ends if of == number), default=0.0)


def load_state(folder: Path) -> RunState:
    """The state an interrupted run left. Raises OutputFolderError when it is damaged."""
    path = folder / STATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        segments = [Segment(**segment) for segment in found["segments"]]
        return RunState(found["identity"], int(found["capture_seed"]), segments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputFolderError(f"{path}: is damaged ({error}); choose another folder and run again") from error


def _short(value: Any) -> str:
    text = str(value)
    return text[:16] + "…" if len(text) > 60 else text
