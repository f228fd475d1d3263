"""Boards as the database would give them: a finished round, a running one, and one whose every word is hostile."""

from __future__ import annotations

from dataclasses import replace

from isologit.judge.board import Board, BoardRow, history
from isologit.judge.statistics import rank

HOSTILE = (
    "<script>document.title='owned'</script>"
    "<img src=http://example.invalid/x onerror=\"document.title='owned'\">{{7*7}}"
)
LONG = "x" * 300
SEEN = {"tokens_rescored": 1_218_004, "tokens_fingerprinted": 1_218_004, "rows_revealed": 896, "accusations": 2}
TIMES = {
    "Flat batches": [41.2, 41.9, 41.5, 42.3, 41.1, 41.7],
    "Plain numpy": [112.4, 113.0, 111.8, 112.9, 113.5, 112.2],
    "Captured graphs": [41.9, 42.6, 41.3, 42.0, 42.8, 41.6],
}


def row(name: str, **fields: object) -> BoardRow:
    made = BoardRow(
        name=name, team="Team of " + name.split()[0], sha256=f"{abs(hash(name)):064x}"[:64],
        techniques=("continuous batching over a flat token batch", "prompt-lookup speculation, verified"), rank=None,
        tied_with=(), status="RUNNING", score=None, times_s=(), reasons=(), panel={},
    )  # fmt: skip
    return replace(made, **fields)  # type: ignore[arg-type]


def finished(**fields: object) -> Board:
    rows = [
        row(
            place.name, rank=place.rank, tied_with=place.tied_with, status="VALID", score=place.score,
            times_s=tuple(TIMES[place.name]), seen=SEEN,
            panel={"innovation": 35, "complexity": 20, "completeness": 28} if place.rank == 1 else {},
        )
        for place in rank(TIMES, "Plain numpy")
    ]  # fmt: skip
    reasons = (
        "213 of 1903 tokens come from other arithmetic than the model's: by their fingerprints, logits are off by up "
        "to 0.31, 0.005 is allowed; the worst is request 9f03aa1c52be7714 token 12",
        "4 of 48 requests failed; the first, 07be551f02c944aa: cut off: no token of any request came for 600 s",
    )
    rows.append(row("Eight-bit weights", status="INVALID", times_s=(20.1, 20.3), reasons=reasons, seen=SEEN))
    board = Board(
        round_id="20260314-101500-a1b2c3", profile="contest-phase2", title="Contest, phase two", state="finished",
        practice=False, anchor="Plain numpy", seed_sha256="a" * 64, seed="b" * 64,
        created_at="2026-03-14T10:15:00+00:00", finished_at="2026-03-14T11:42:10+00:00",
        environment={"cpu": "AMD EPYC 9454 48-Core Processor", "cores": 8, "versions": {"numpy": "2.4.0"}},
        done=64, total=64, repeated=2, rows=tuple(rows), history=history("contest-phase1"),
        panel={"innovation": 40, "complexity": 30, "completeness": 30},
    )  # fmt: skip
    return replace(board, **fields)  # type: ignore[arg-type]


def running() -> Board:
    rows = tuple(row(name, times_s=tuple(times[:2])) for name, times in TIMES.items())
    return finished(state="running", seed=None, finished_at=None, done=23, rows=rows, doing="Plain numpy, twins run 1")


def hostile() -> Board:
    rows = []
    for known in finished().rows:
        words = {"name": HOSTILE + known.name, "team": LONG, "techniques": (HOSTILE, LONG)}
        rows.append(replace(known, **words, reasons=(HOSTILE, LONG) if known.reasons else ()))
    return finished(
        title=HOSTILE,
        anchor=LONG,
        rows=tuple(rows),
        environment={"cpu": LONG, "cores": 2, "versions": {LONG: LONG}},
        doing=HOSTILE,
    )
