"""A finished round judged by newer audits: runs that they want are made, and whoever moves is listed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import select
from tests.judge.small_round import SEED, practice
from typer.testing import CliRunner

from isologit.cli.app import app
from isologit.judge.board import read_board
from isologit.judge.database import Database, RoundRow, RunRow, VerdictRow
from isologit.judge.evidence import RUN_FILE
from isologit.judge.profile import Profile
from isologit.judge.round import RUNS, order_of_runs

REPEATS = 6
NUMPY, INT8 = "Plain numpy", "Int8 weights"


@pytest.fixture
def round_of_six(finished_round: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    """The finished round as if it had six repeats, in which the cheat is clearly faster, and one audit: nobody is
    accused."""
    folder, round_id = shutil.copytree(finished_round[0], tmp_path / "judge"), finished_round[1]
    with Database(folder).session() as session:
        for run in list(session.scalars(select(RunRow).where(RunRow.round_id == round_id))):
            fastest = 1.0 if run.entry.name == INT8 else 2.0
            run.duration_s = fastest
            for repeat in range(1, REPEATS):
                name = f"{run.id}-copy-{repeat}"
                shutil.copytree(folder / RUNS / run.id, folder / RUNS / name)
                file = folder / RUNS / name / RUN_FILE
                file.write_text(json.dumps({**json.loads(file.read_text()), "run_id": name}))
                session.add(
                    RunRow(
                        id=name, round_id=round_id, entry_id=run.entry_id, kind="timed", repeat=repeat, attempt=1,
                        place=run.place + repeat, state="done", note="", duration_s=fastest + repeat / 100,
                    )
                )  # fmt: skip
    set_profile(folder, round_id, repeats=REPEATS, audits=["conservation"])
    return folder, round_id


def set_profile(folder: Path, round_id: str, **fields: object) -> Profile:
    """The audits of another day."""
    with Database(folder).session() as session:
        row = session.get(RoundRow, round_id)
        assert row is not None
        row.profile = {**row.profile, **fields}
        return Profile.model_validate(row.profile)


def again(folder: Path) -> list[str]:
    """What `isologit judge again` lists."""
    done = CliRunner().invoke(app, ["judge", "again", "--folder", str(folder)])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert any(line.startswith("reports:") for line in lines)
    return lines[next(i for i, line in enumerate(lines) if line.startswith("reports:")) + 1 :]


def ranked(rank: int) -> str:
    return "NOT RANKED" if practice() else f"VALID, rank {rank}"


def moved(name: str, before: str, after: str) -> list[str]:
    return [f"{name}: {before} -> {after}"] if before != after else []


def kinds(folder: Path) -> Counter[tuple[str, str]]:
    with Database(folder).session() as session:
        return Counter((run.kind, run.state) for run in session.scalars(select(RunRow)))


def test_a_newer_audit_makes_the_runs_that_it_wants_and_lists_who_moves(round_of_six: tuple[Path, str]) -> None:
    folder, round_id = round_of_six
    before = kinds(folder)
    assert before == {("timed", "done"): 2 * REPEATS}
    assert again(folder) == moved(INT8, "INVALID", ranked(1)) + moved(NUMPY, ranked(1), ranked(2))
    assert kinds(folder) == before

    profile = set_profile(folder, round_id, audits=["conservation", "fingerprint", "request_bodies"])
    assert again(folder) == moved(NUMPY, ranked(2), ranked(1)) + moved(INT8, ranked(1), "INVALID")
    assert kinds(folder) == before + Counter({("probed", "done"): 4})
    board = read_board(Database(folder), round_id)
    assert (board.state, board.total) == ("finished", len(list(order_of_runs([NUMPY, INT8], profile, SEED))))

    assert again(folder) == ["no verdict and no rank has changed"]
    with Database(folder).session() as session:
        verdicts = [verdict.current for verdict in session.scalars(select(VerdictRow))]
    assert (len(verdicts), sum(verdicts)) == (8, 2)  # older ones stay
