"""A round in one file: entries, evidence, profile, seed and ranks, so that anyone can judge it again (`verify`).

Owns the archive's layout and its unpacking, which trusts nothing in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from isologit.common.files import write_atomically
from isologit.errors import UserError
from isologit.judge.board import read_board
from isologit.judge.database import JUDGED, Database, RoundRow
from isologit.judge.entry import Entry
from isologit.judge.round import ENTRIES, RUNS
from isologit.judge.statistics import Score

ROUND_FILE, HASHES_FILE = "round.json", "SHA256SUMS"
PACK_FORMAT = 1
_MOST_FILES, _MOST_BYTES, _MOST_RATIO = 100_000, 8 << 30, 200


class PackError(UserError):
    """A pack cannot be written, or is not what it says."""


def write_pack(database: Database, round_id: str, target: Path) -> Path:
    """Zip a finished round. Raises PackError while it runs, or when the file cannot be written."""
    board = read_board(database, round_id)
    if board.state != "finished":
        raise PackError(f"{round_id}: the round is not finished; its seed is still secret")
    with database.session() as session:
        row = session.get(RoundRow, round_id)
        assert row is not None
        about: dict[str, Any] = {
            "format": PACK_FORMAT,
            "round_id": row.id,
            "profile": row.profile,
            "seed_sha256": row.seed_sha256,
            "seed": row.seed,
            "practice": row.practice,
            "environment": row.environment,
            "anchor": row.anchor.sha256,
            "runs": [
                {"id": r.id, "entry": r.entry.sha256, "kind": r.kind, "repeat": r.repeat, "attempt": r.attempt,
                 "state": r.state, "note": r.note}
                for r in row.runs
            ],
            "verdicts": [
                {"entry": v.entry.sha256, "status": v.status, "findings": v.findings} for v in row.verdicts if v.current
            ],
            "places": [
                {"entry": r.sha256, "rank": r.rank, "times_s": r.times_s, **shown_figures(r.score)}
                for r in board.rows if r.score is not None
            ],
        }  # fmt: skip
    files: dict[str, Path] = {}
    for run in about["runs"]:
        if run["state"] in JUDGED:
            folder = database.folder / RUNS / run["id"]
            files.update({f"{RUNS}/{run['id']}/{file.name}": file for file in sorted(folder.iterdir())})
    for sha256 in {run["entry"] for run in about["runs"]}:
        folder = database.folder / ENTRIES / sha256
        files.update({f"{ENTRIES}/{sha256}/{name}": folder / name for name in Entry(folder).files()})

    def write(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            said = json.dumps(about, indent=1).encode()
            archive.writestr(ROUND_FILE, said)
            sums = [f"{hashlib.sha256(said).hexdigest()}  {ROUND_FILE}\n"]
            for name, file in files.items():
                archive.write(file, name)
                with file.open("rb") as opened:
                    sums.append(f"{hashlib.file_digest(opened, 'sha256').hexdigest()}  {name}\n")
            archive.writestr(HASHES_FILE, "".join(sums))

    try:
        write_atomically(target, write)
    except OSError as error:
        raise PackError(f"{target}: cannot be written ({error.strerror}); choose another place") from None
    return target


def shown_figures(score: Score) -> dict[str, float]:
    """What the board shows of a score."""
    return {"median_s": score.median_s, "ratio": score.ratio, "low": score.low, "high": score.high}


def unpack(pack: Path, folder: Path) -> None:
    """Unpack an archive that nobody vouches for.

    Raises PackError for paths that leave the folder, links, special files, names that come twice, more than 100,000
    files or 8 GiB, or compression that only a bomb has. Nothing is left behind then.
    """
    try:
        with zipfile.ZipFile(pack) as archive:
            infos = archive.infolist()
            _check(pack, infos)
            for info in infos:
                target = folder / info.filename
                if info.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, target.open("xb") as out:
                    shutil.copyfileobj(source, out)
    except OSError as error:
        raise PackError(f"{pack}: cannot be unpacked ({error.strerror})") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise PackError(f"{pack}: cannot be unpacked ({' '.join(str(error).split())})") from None


def _check(pack: Path, infos: list[zipfile.ZipInfo]) -> None:
    if len(infos) > _MOST_FILES:
        raise PackError(f"{pack}: holds more than {_MOST_FILES} files")
    seen: set[str] = set()
    total = 0
    for info in infos:
        path = PurePosixPath(info.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename or not path.parts:
            raise PackError(f"{pack}: {info.filename!r} would be written outside the folder")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise PackError(f"{pack}: {info.filename!r} is a link or a special file")
        if str(path) in seen:
            raise PackError(f"{pack}: {info.filename!r} comes twice")
        seen.add(str(path))
        total += info.file_size
        if total > _MOST_BYTES or info.file_size > _MOST_RATIO * max(info.compress_size, 1024):
            raise PackError(f"{pack}: {info.filename!r} unpacks to far more than a round needs")
