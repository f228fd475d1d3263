"""What is kept of a run, as files: everything a verdict rests on, and nothing that is not on disk.

A run's folder holds `run.json` (what ran, under which conditions, what the process did), `records.jsonl` (every
request), and `revealed.jsonl` (rows given after the stream ended). Audits see only this, so a verdict can be
recomputed offline, by audits that did not exist when the run was made.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from isologit.common.commitment import FINGERPRINT_SIZE
from isologit.errors import UserError
from isologit.judge import strict_json

RUN_FILE, RECORDS_FILE, REVEALED_FILE = "run.json", "records.jsonl", "revealed.jsonl"
RunKind = Literal["timed", "held-out", "twins", "probed", "perturbed"]
"""timed: what is ranked. held-out, twins: as many requests, of a secret set and of copies. probed: log-probabilities
are asked for as well. perturbed: one layer's weights are others."""

ErrorCode = Literal["connection", "status", "json", "dialect", "end", "size", "time"]


class EvidenceError(UserError):
    """A run's files are not what a judge wrote."""


@dataclass
class RequestEvidence:
    """One request as the judge saw it; times are seconds since the first was due, None for what never happened.

    arrivals: (second, tokens) of every message that carried tokens. body_sha256: of the fields other than prompt and
    length. fingerprints: float32 [n, 16] or None where the entry does not commit.
    """

    id: str
    prompt: str
    max_tokens: int
    body_sha256: str
    scheduled_s: float
    sent_s: float | None = None
    finished_s: float | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    reported_tokens: int | None = None
    ended: bool = False
    fingerprints: list[str] = field(default_factory=list)  # base64
    commitments: list[str] = field(default_factory=list)  # base64
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    status: Literal["pending", "completed", "failed"] = "pending"
    error: str | None = None
    error_code: ErrorCode | None = None

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> RequestEvidence:
        """From its JSON. Raises TypeError, ValueError or LookupError for anything else."""
        return cls(**{**line, "arrivals": [(float(second), int(count)) for second, count in line["arrivals"]]})

    def fingerprint_rows(self) -> np.ndarray:
        """float32 [n, 16]."""
        raw = b"".join(base64.b64decode(row) for row in self.fingerprints)
        return np.frombuffer(raw, "<f4").reshape(-1, FINGERPRINT_SIZE)


@dataclass(frozen=True)
class RevealedRow:
    """The vector that the LM head read for one output token, as the entry gave it afterwards; base64 of float32."""

    request_id: str
    index: int
    hidden: str

    def row(self) -> np.ndarray:
        """float32 [hidden]."""
        return np.frombuffer(base64.b64decode(self.hidden), "<f4")


@dataclass
class ProcessFacts:
    """What the operating system says of the entry's process. Seconds of processor time, MiB, hashes of its files."""

    started: bool = False
    start_s: float | None = None
    start_cpu_s: float | None = None
    run_cpu_s: float | None = None
    peak_memory_mib: float | None = None
    output_bytes: int = 0
    exit_code: int | None = None
    died: bool = False
    killed: bool = False
    left_processes: int = 0
    files_before: str | None = None
    files_after: str | None = None
    scratch_was_empty: bool = True
    sandbox: str = "none"
    mounts: list[str] = field(default_factory=list)
    own_namespaces: list[str] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)  # addresses it was connected to, other than its own
    allowed_mounts: list[str] = field(default_factory=list)
    problem: str | None = None


@dataclass
class RunEvidence:
    """A run: its place in the round, its conditions, the process, the requests and the rows revealed.

    positions: (request id, output index) that the entry was asked to reveal. canary_s: seconds of the fixed kernel
    before and after. peak_flop_per_s: of the
    judge's own matrix product on the cores that the entry has. void: the machine drifted; its time does not count, but
    whatever else was found in it does. client_lag_s: the longest time that the judge's own load was late to look at
    what had come.
    """

    round_id: str
    run_id: str
    kind: RunKind
    entry: str
    entry_sha256: str
    attempt: int
    nonce: str
    commit: bool
    dialect: str
    process: ProcessFacts
    duration_s: float | None = None
    canary_s: tuple[float, float] | None = None
    peak_flop_per_s: float | None = None
    void: bool = False
    client_problem: str | None = None
    client_problem_code: ErrorCode | None = None
    client_lag_s: float | None = None
    reveal_problem: str | None = None
    positions: list[tuple[str, int]] = field(default_factory=list)
    records: list[RequestEvidence] = field(default_factory=list)
    revealed: list[RevealedRow] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """All files, into a folder that exists; the caller makes it final by a rename."""
        whole = asdict(self)
        records, revealed = whole.pop("records"), whole.pop("revealed")
        _write_lines(folder / RECORDS_FILE, records)
        _write_lines(folder / REVEALED_FILE, revealed)
        (folder / RUN_FILE).write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RunEvidence:
        """The run in `folder`. Raises EvidenceError when a file is missing or was altered out of shape."""
        try:
            whole = strict_json.loads((folder / RUN_FILE).read_bytes())
            records = [RequestEvidence.from_dict(line) for line in _read_lines(folder / RECORDS_FILE)]
            revealed = [RevealedRow(**line) for line in _read_lines(folder / REVEALED_FILE)]
            process = ProcessFacts(**whole.pop("process"))
            positions = [(str(name), int(index)) for name, index in whole.pop("positions")]
            canary = whole.pop("canary_s")
            return cls(
                **whole,
                process=process,
                positions=positions,
                canary_s=None if canary is None else (float(canary[0]), float(canary[1])),
                records=records,
                revealed=revealed,
            )
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise EvidenceError(f"{folder}: not a run's evidence ({' '.join(str(error).split())})") from None


def _write_lines(file: Path, items: Iterable[Any]) -> None:
    with file.open("w", encoding="utf-8") as out:
        for item in items:
            out.write(json.dumps(item, allow_nan=False) + "\n")


def _read_lines(file: Path) -> list[Any]:
    return [strict_json.loads(line) for line in file.read_bytes().splitlines() if line]
