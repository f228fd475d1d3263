"""A judge that is killed, interrupted, or finds its disk full or damaged goes on to the same right end."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select
from tests.judge.small_round import PROFILE, SEED, begin

from isologit.judge.board import read_board
from isologit.judge.database import FINAL, Database, RoundRow, RunRow, VerdictRow
from isologit.judge.evidence import RunEvidence
from isologit.judge.round import RUNS, Judge, JudgeError, order_of_runs

GONE_S = 10.0


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "isologit", "judge", "resume", "--folder", str(folder)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background shell ignores
    )


def of_this_round(folder: Path) -> list[str]:
    """Living processes that name the judge's folder: bubblewrap with an entry, the load, the judge itself."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and any(str(folder) in word for word in process.cmdline())
            ):
                found.append(" ".join(process.cmdline())[:200])
        except psutil.Error:
            continue
    return found


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + GONE_S
    while (left := of_this_round(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def check_end(folder: Path, round_id: str) -> None:
    """Every run is final, evidence is complete, nothing is there twice, and the verdicts are the right ones."""
    database = Database(folder)
    with database.session() as session:
        runs = list(session.scalars(select(RunRow).where(RunRow.round_id == round_id)))
        entries = {run.entry_id: run.entry.name for run in runs}
        assert {run.state for run in runs} <= FINAL
        done = sorted((run.entry.name, run.kind, run.repeat) for run in runs if run.state == "done")
        assert done == sorted(order_of_runs(list(entries.values()), PROFILE, SEED))
        kept = {run.id for run in runs if run.state in ("done", "voided")}
        assert {path.name for path in (folder / RUNS).iterdir()} == kept
        for run in runs:
            if run.state == "done":
                evidence = RunEvidence.read(folder / RUNS / run.id)
                assert (evidence.run_id, evidence.duration_s) == (run.id, run.duration_s)
                assert [r.status for r in evidence.records] == ["completed"] * PROFILE.prompts.count
        current = list(session.scalars(select(VerdictRow).where(VerdictRow.current.is_(True))))
        assert sorted(v.entry.name for v in current) == sorted(entries.values())
    board = read_board(database, round_id)
    assert (board.state, board.done) == ("finished", board.total)
    invalid = {row.name: row.status == "INVALID" for row in board.rows}
    assert invalid == {"Plain numpy": False, "Int8 weights": True}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_judge_goes_on(tmp_path: Path, kills: int) -> None:
    round_id = begin(tmp_path)
    chance = random.Random(kills)
    for _ in range(kills):
        judge = start(tmp_path)
        time.sleep(chance.uniform(0.5, 10.0))
        judge.kill()
        judge.communicate()
        wait_until_gone(tmp_path)
    judge = start(tmp_path)
    said = judge.communicate(timeout=240)
    assert judge.returncode == 1, said  # one entry is INVALID
    check_end(tmp_path, round_id)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_judge_ends_what_it_started(tmp_path: Path, number: signal.Signals) -> None:
    begin(tmp_path)
    judge = start(tmp_path)
    deadline = time.monotonic() + 60
    while not any("bwrap" in line or "supervisor" in line for line in of_this_round(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    judge.send_signal(number)
    assert judge.communicate(timeout=30)[1].endswith("interrupted\n")
    assert judge.returncode == 130
    wait_until_gone(tmp_path)


def test_two_judges_do_not_share_a_round(tmp_path: Path) -> None:
    round_id = begin(tmp_path)
    first, second = Judge(tmp_path), Judge(tmp_path)
    with first._alone(), pytest.raises(JudgeError, match=f"another judge is at work here .process {os.getpid()}"):
        second.run(round_id)


def copy(finished_round: tuple[Path, str], target: Path) -> tuple[Path, str]:
    shutil.copytree(finished_round[0], target / "judge")
    return target / "judge", finished_round[1]


def reopen(folder: Path, round_id: str, **profile: object) -> None:
    """As if the judge had been killed before its verdicts."""
    with Database(folder).session() as session:
        row = session.get(RoundRow, round_id)
        assert row is not None
        row.state, row.finished_at = "running", None
        row.profile = {**row.profile, **profile}


def test_the_finished_round_is_right(finished_round: tuple[Path, str]) -> None:
    check_end(*finished_round)


@pytest.mark.parametrize("damage", ["cut", "missing", "garbage"])
def test_damaged_evidence_is_made_again(finished_round: tuple[Path, str], tmp_path: Path, damage: str) -> None:
    folder, round_id = copy(finished_round, tmp_path)
    run = sorted((folder / RUNS).iterdir())[0]
    file = run / "records.jsonl"
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"\0" * len(data))
    reopen(folder, round_id)
    Judge(folder).run(round_id)
    check_end(folder, round_id)
    with Database(folder).session() as session:
        row = session.get(RunRow, run.name)
        assert row is not None
        assert (row.state, "damaged" in row.note) == ("abandoned", True)


def test_a_run_that_was_kept_but_not_noted_counts(finished_round: tuple[Path, str], tmp_path: Path) -> None:
    folder, round_id = copy(finished_round, tmp_path)
    reopen(folder, round_id)
    with Database(folder).session() as session:
        run = session.scalars(select(RunRow)).first()
        assert run is not None
        run.state, run.duration_s, chosen = "running", None, run.id
    Judge(folder).run(round_id)
    check_end(folder, round_id)
    with Database(folder).session() as session:
        assert session.get(RunRow, chosen).state == "done"  # type: ignore[union-attr]


def test_a_full_disk_ends_the_judge_not_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    round_id = begin(tmp_path)

    def full(self: RunEvidence, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(RunEvidence, "write", full)
        with pytest.raises(OSError, match="No space"):
            Judge(tmp_path).run(round_id)
    wait_until_gone(tmp_path)
    Judge(tmp_path).run(round_id)
    check_end(tmp_path, round_id)
