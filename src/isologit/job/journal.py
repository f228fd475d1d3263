"""What a run has finished so far, on disk while it runs: a kill at any moment loses only what was not finished.

A finished request is one line of `outputs.partial.jsonl`, its captured rows are float32 rows of `logits.partial.bin`.
NOTE: rows are written before the line that names them, so a line whose rows are there is whole. Knows no engine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from isologit.engine.request import RequestOutput
from isologit.engine.step_record import StepRecord
from isologit.job.folder import PARTIAL_OUTPUTS, PARTIAL_ROWS, PARTIAL_STEPS, json_line

_STEPS_EVERY_S = 1.0
_SYNC_EVERY_S = 10.0


@dataclass(frozen=True)
class FinishedRequest:
    """A request that came back. rows: number of its captured rows in the rows file, by output index.

    metrics: seconds since the segment's inference began. segment: 0 before the first interruption, and so on.
    """

    request_id: str
    prompt: str | None
    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None
    error: str | None
    metrics: dict[str, float | None]
    segment: int
    rows: dict[int, int]

    @property
    def completed(self) -> bool:
        """Whether it has its whole answer."""
        return self.finish_reason in ("stop", "length")

    @classmethod
    def of(cls, output: RequestOutput, segment: int, first_row: int) -> FinishedRequest:
        """An engine's output whose captured rows, in the order of their indices, start at `first_row`."""
        return cls(
            request_id=output.request_id,
            prompt=output.prompt,
            text=output.text,
            prompt_token_ids=list(output.prompt_token_ids),
            token_ids=list(output.token_ids),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            error=output.error,
            metrics=asdict(output.metrics),
            segment=segment,
            rows={index: first_row + i for i, index in enumerate(sorted(output.captured))},
        )

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> FinishedRequest:
        """Raises KeyError, TypeError or ValueError for a line of another form."""
        return cls(**{**line, "rows": {int(index): int(row) for index, row in line["rows"].items()}})


class Journal:
    """The partial files of one run folder. Reading drops a torn end; writing goes on after it."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.finished: dict[str, FinishedRequest] = {}
        self.steps: list[dict[str, Any]] = []  # with their segment
        self._vocab_size = vocab_size
        self._rows_path = folder / PARTIAL_ROWS
        self._rows = _open(self._rows_path)
        self._outputs = _open(folder / PARTIAL_OUTPUTS)
        self._steps = _open(folder / PARTIAL_STEPS)
        self._num_rows = self._rows.seek(0, os.SEEK_END) // (4 * vocab_size)
        for line in _read_whole_lines(self._outputs):
            found = FinishedRequest.from_line(line)
            if all(row < self._num_rows for row in found.rows.values()):
                self.finished[found.request_id] = found
        self.steps.extend(_read_whole_lines(self._steps))
        self._rows.seek(4 * vocab_size * self._num_rows)
        self._rows.truncate()
        self._num_steps = 0  # of the segment that is running
        self._steps_s = self._synced_s = time.monotonic()

    def append(self, output: RequestOutput, segment: int) -> FinishedRequest:
        """Keep a finished request and its captured rows."""
        found = FinishedRequest.of(output, segment, self._num_rows)
        for index in sorted(output.captured):
            row = output.captured[index]
            assert row.dtype == np.float32
            assert row.shape == (self._vocab_size,)
            self._rows.write(row.tobytes())
        self._num_rows += len(found.rows)
        self._rows.flush()
        self._outputs.write(json_line(asdict(found)).encode())
        self._outputs.flush()
        self.finished[found.request_id] = found
        return found

    def append_steps(self, records: Sequence[StepRecord], segment: int, *, now: bool = False) -> None:
        """Keep the records not kept yet, once a second (or `now`); what is on disk then survives even a power cut."""
        clock = time.monotonic()
        if not now and clock - self._steps_s < _STEPS_EVERY_S:
            return
        self._steps_s = clock
        fresh = [{**asdict(record), "segment": segment} for record in records[self._num_steps :]]
        self._num_steps += len(fresh)
        self.steps.extend(fresh)
        self._steps.write("".join(json_line(step) for step in fresh).encode())
        self._steps.flush()
        if now or clock - self._synced_s >= _SYNC_EVERY_S:
            self._synced_s = clock
            for file in (self._rows, self._outputs, self._steps):
                os.fsync(file.fileno())

    def captured(self) -> dict[tuple[str, int], np.ndarray]:
        """Rows float32 [vocab] of complete requests, by request id and output index, mapped from the file."""
        if not self._num_rows:
            return {}
        rows = np.memmap(self._rows_path, np.float32, "r", shape=(self._num_rows, self._vocab_size))
        return {
            (found.request_id, index): rows[row]
            for found in self.finished.values()
            if found.completed
            for index, row in found.rows.items()
        }

    def close(self) -> None:
        """Close the files; they stay."""
        for file in (self._rows, self._outputs, self._steps):
            file.close()


def _open(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")


def _read_whole_lines(file: BinaryIO) -> list[dict[str, Any]]:
    """JSON objects up to the first line that is not one; the file is cut there, and writing goes on from there."""
    found: list[dict[str, Any]] = []
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        try:
            found.append(json.loads(line))
        except ValueError:
            break
        end += len(line)
    file.seek(end)
    file.truncate()
    return found
