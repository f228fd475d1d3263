"""A pack is judged again from its evidence alone: what was changed in it is found, also when the hashes fit."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from tests.judge.small_round import practice

from isologit.judge import verify
from isologit.judge.board import read_board
from isologit.judge.database import Database, RoundRow, VerdictRow
from isologit.judge.pack import HASHES_FILE, ROUND_FILE, PackError, unpack, write_pack
from isologit.judge.pages import board_page
from isologit.judge.panel import PanelError, medals, record_points
from isologit.judge.round import Judge
from isologit.judge.seeds import RoundSeed
from isologit.judge.verify import verify_folder, verify_pack, wrong_hashes

Round = tuple[Path, str]


@pytest.fixture(scope="session")
def packed(finished_round: Round, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, round_id = finished_round
    return write_pack(Database(folder), round_id, tmp_path_factory.mktemp("pack") / "round.zip")


@pytest.fixture(scope="module", autouse=True)
def _one_reference() -> Iterator[None]:
    """The reference is loaded once, and keeps what it has computed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verify, "JudgeReference", cache(verify.JudgeReference))
        yield


@pytest.fixture
def unpacked(packed: Path, tmp_path: Path) -> Path:
    unpack(packed, tmp_path / "pack")
    return tmp_path / "pack"


def test_a_pack_that_cannot_be_written_is_one_error_and_no_file(finished_round: Round, tmp_path: Path) -> None:
    folder, round_id = finished_round
    with pytest.raises(PackError, match=r"none/round.zip: cannot be written \(No such file"):
        write_pack(Database(folder), round_id, tmp_path / "none" / "round.zip")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(PackError, match=r"round.zip: cannot be written \(File too large\)"):
            write_pack(Database(folder), round_id, tmp_path / "round.zip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_untouched_pack_agrees(packed: Path) -> None:
    found = verify_pack(packed)
    assert found.problems == ()
    assert {name: verdict.status for name, verdict in found.verdicts.items()} == {
        "Plain numpy": "VALID",
        "Int8 weights": "INVALID",
    }
    assert found.ranks == ({} if practice() else {"Plain numpy": 1})


def test_any_changed_file_is_named(unpacked: Path) -> None:
    assert wrong_hashes(unpacked) == []
    files = [path for path in sorted(unpacked.rglob("*")) if path.is_file() and path.name != HASHES_FILE]
    assert len(files) > 10
    for file in files:
        data = file.read_bytes()
        name = file.relative_to(unpacked).as_posix()
        file.write_bytes(data + b"\n")
        assert wrong_hashes(unpacked) == [f"{name} is not the file that was packed"]
        file.unlink()
        assert wrong_hashes(unpacked) == [f"{name} is missing"]
        file.write_bytes(data)
    (unpacked / "more").write_text("")
    assert wrong_hashes(unpacked) == ["more is not listed"]


def about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / ROUND_FILE).read_text())
    return found


def change_round(folder: Path, **fields: Any) -> None:
    (folder / ROUND_FILE).write_text(json.dumps({**about(folder), **fields}))


def run_of(folder: Path, name: str) -> Path:
    """The timed run of an entry."""
    entry = next(
        sha for sha in (path.name for path in (folder / "entries").iterdir())
        if name in (folder / "entries" / sha / "entry.yaml").read_text()
    )  # fmt: skip
    return folder / "runs" / next(run["id"] for run in about(folder)["runs"] if run["entry"] == entry)


def change_run(folder: Path, **fields: Any) -> None:
    file = run_of(folder, "Plain numpy") / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_records(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    file = run_of(folder, "Plain numpy") / "records.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    change(records)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def hide_the_cheat(folder: Path) -> None:
    change_round(folder, verdicts=[{**v, "status": "VALID"} for v in about(folder)["verdicts"]])


def another_time(folder: Path) -> None:
    """In the run and in its requests."""
    change_records(folder, lambda records: [r.update(finished_s=2 * r["finished_s"]) for r in records])
    file = run_of(folder, "Plain numpy") / "run.json"
    change_run(folder, duration_s=2 * json.loads(file.read_text())["duration_s"])


def leave_a_time_out(folder: Path) -> None:
    gone = run_of(folder, "Plain numpy").name
    runs = [{**run, "state": "voided"} if run["id"] == gone else run for run in about(folder)["runs"]]
    change_round(folder, runs=runs)
    change_run(folder, void=True)


def change_places(folder: Path, **fields: Any) -> None:
    change_round(folder, places=[{**place, **fields} for place in about(folder)["places"]])


def leave_out_a_run(folder: Path) -> None:
    gone = run_of(folder, "Int8 weights")
    shutil.rmtree(gone)
    change_round(folder, runs=[run for run in about(folder)["runs"] if run["id"] != gone.name])


def swap_runs(folder: Path) -> None:
    mine, other = run_of(folder, "Plain numpy"), run_of(folder, "Int8 weights")
    shutil.rmtree(other)
    shutil.copytree(mine, other)


def another_seed(folder: Path) -> None:
    seed = RoundSeed(bytes(32))
    change_round(folder, seed=seed.secret.hex(), seed_sha256=seed.published)


def edit_the_entry(folder: Path) -> None:
    for file in (folder / "entries").glob("*/server.py"):
        file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (lambda f: change_round(f, seed="00" * 32), "whose hash was published"),
        (another_seed, "nonce does not follow from the seed"),
        (lambda f: change_records(f, list.reverse), "prompts or their order do not follow"),
        (lambda f: change_run(f, positions=[]), "revealed positions do not follow"),
        (lambda f: change_run(f, nonce="00" * 32), "nonce does not follow"),
        (lambda f: change_run(f, duration_s=0.001), "time is not that of its requests"),
        (lambda f: change_run(f, commit=False), "its evidence is that of another run"),
        (lambda f: change_records(f, lambda r: r[0].update(token_ids=r[0]["token_ids"][::-1])), "its evidence INVALID"),
        (hide_the_cheat, "the pack says VALID, its evidence INVALID"),
        (leave_out_a_run, "timed run 1 is there 0 times"),
        (swap_runs, "its evidence is that of another run"),
        (edit_the_entry, "its files have another hash"),
        (another_time, "the times in the pack are not those of its runs"),
        (leave_a_time_out, "its time does not count, but the machine did not drift"),
        (lambda f: change_places(f, rank=2), "Plain numpy: the pack says rank 2, its evidence"),
        (lambda f: change_places(f, times_s=[0.1]), "the times in the pack are not those of its runs"),
        (lambda f: change_places(f, ratio=0.9), "the pack says ratio 0.9, its runs give 1"),
    ],
)  # fmt: skip
def test_tampering_is_found_though_the_hashes_fit(unpacked: Path, tamper: Callable[[Path], None], said: str) -> None:
    tamper(unpacked)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(unpacked).as_posix()}\n"
        for path in sorted(unpacked.rglob("*"))
        if path.is_file() and path.name != HASHES_FILE
    ]
    (unpacked / HASHES_FILE).write_text("".join(lines))
    assert wrong_hashes(unpacked) == []
    assert said in " ".join(verify_folder(unpacked, None).problems)


def copied(finished_round: Round, tmp_path: Path) -> Round:
    shutil.copytree(finished_round[0], tmp_path / "judge")
    return tmp_path / "judge", finished_round[1]


def test_judged_again_by_fewer_audits_the_rank_changes_and_the_old_verdict_stays(
    finished_round: Round, tmp_path: Path
) -> None:
    folder, round_id = copied(finished_round, tmp_path)
    with Database(folder).session() as session:
        row = session.get(RoundRow, round_id)
        assert row is not None
        row.profile = {**row.profile, "audits": ["conservation"]}
    before = {row.name: row.status for row in read_board(Database(folder), round_id).rows}
    Judge(folder).again(round_id)
    after = {row.name: row.status for row in read_board(Database(folder), round_id).rows}
    assert before["Int8 weights"] == "INVALID"
    assert after["Int8 weights"] != "INVALID"
    with Database(folder).session() as session:
        kept = [(v.entry.name, v.status, v.current) for v in session.scalars(select(VerdictRow))]
    assert ("Int8 weights", "INVALID", False) in kept
    assert len([1 for _, _, current in kept if current]) == 2


def test_points_of_a_panel_give_medals_on_the_board(finished_round: Round, tmp_path: Path) -> None:
    folder, round_id = copied(finished_round, tmp_path)
    database = Database(folder)
    with pytest.raises(PanelError, match="no panel"):
        record_points(database, round_id, "Plain numpy", ["innovation=1"])
    with database.session() as session:
        row = session.get(RoundRow, round_id)
        assert row is not None
        row.practice = False
        row.profile = {**row.profile, "panel": {"innovation": 40, "complexity": 30, "completeness": 30}}
    with pytest.raises(PanelError, match=r"innovation=0\.\.40"):
        record_points(database, round_id, "Plain numpy", ["innovation=41"])
    record_points(database, round_id, "Plain numpy", ["innovation=40", "complexity=3"])
    assert medals(read_board(database, round_id)) == {}  # one is missing
    record_points(database, round_id, "Plain numpy", ["completeness=30"])
    record_points(database, round_id, "Int8 weights", ["innovation=40", "complexity=30", "completeness=30"])
    board = read_board(database, round_id)
    given = medals(board)
    assert {row.name: given.get(row.sha256) for row in board.rows} == {"Plain numpy": "gold", "Int8 weights": None}
    page = board_page(board, links={})
    assert ">gold<" in page
    assert "complexity 3 of 30" in " ".join(page.split())
