"""A round in one file: entries, evidence, profile and seed, so that anyone can judge it again offline.

Owns the archive's layout and its unpacking, which trusts nothing in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from isologit.common.files import write_atomically
from isologit.errors import UserError
from isologit.judge import strict_json
from isologit.judge.audits.base import Case
from isologit.judge.board import read_board
from isologit.judge.database import JUDGED, Database, RoundRow
from isologit.judge.entry import Entry
from isologit.judge.evidence import RunEvidence
from isologit.judge.perturb import perturbed_model
from isologit.judge.positions import draw_positions
from isologit.judge.profile import Profile
from isologit.judge.prompts import draw_prompts
from isologit.judge.reference import JudgeReference
from isologit.judge.round import ENTRIES, RUNS, model_folder, run_kinds
from isologit.judge.run import RunSpec
from isologit.judge.seeds import RoundSeed
from isologit.judge.verdict import EntryVerdict, judge_case
from isologit.text.tokenizer import load_tokenizer

ROUND_FILE, HASHES_FILE = "round.json", "SHA256SUMS"
_MOST_FILES, _MOST_BYTES, _MOST_RATIO = 100_000, 8 << 30, 200
_FORMAT = 1


class PackError(UserError):
    """A pack cannot be written, or is not what it says."""


@dataclass(frozen=True)
class Verified:
    """What an offline judgement found: its own verdict, the one in the pack, and everything that does not agree."""

    round_id: str
    verdicts: dict[str, EntryVerdict]
    problems: tuple[str, ...]


def write_pack(database: Database, round_id: str, target: Path) -> Path:
    """Zip a finished round. Raises PackError while it runs, OSError when the file cannot be written."""
    board = read_board(database, round_id)
    if board.state != "finished":
        raise PackError(f"{round_id}: the round is not finished; its seed is still secret")
    with database.session() as session:
        row = session.get(RoundRow, round_id)
        assert row is not None
        about: dict[str, Any] = {
            "format": _FORMAT,
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

    write_atomically(target, write)
    return target


def verify_pack(pack: Path, *, model: Path | None = None) -> Verified:
    """Judge a pack again: hashes, seed, prompts and their order, nonces, positions, and all verdicts, from evidence.

    Raises PackError when it cannot be read at all; what merely does not agree is in `problems`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(pack, folder)
        return _verify(folder, model)


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
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
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


def _verify(folder: Path, model: Path | None) -> Verified:
    problems = _wrong_hashes(folder)
    try:
        about = strict_json.loads((folder / ROUND_FILE).read_bytes())
        profile, seed = Profile.model_validate(about["profile"]), RoundSeed.from_hex(about["seed"])
        runs, claimed = about["runs"], {v["entry"]: v["status"] for v in about["verdicts"]}
        round_id = str(about["round_id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PackError(f"{ROUND_FILE}: not a round's ({' '.join(str(error).split())[:200]})") from None
    if seed.published != about["seed_sha256"]:
        problems.append("the seed is not the one whose hash was published before the round")
    where = model_folder(profile, model)
    tokenizer = load_tokenizer(where)
    assert tokenizer is not None
    prompts = draw_prompts(profile, seed, tokenizer)
    reference = JudgeReference(where)
    verdicts: dict[str, EntryVerdict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        others: dict[int, JudgeReference] = {}
        for sha256 in sorted({run["entry"] for run in runs} | set(claimed)):
            entry = Entry(folder / ENTRIES / sha256)
            if entry.sha256() != sha256:
                problems.append(f"entry {sha256[:12]}: its files have another hash")
            evidence, perturbed = [], {}
            for run in runs:
                if run["entry"] != sha256 or run["state"] not in JUDGED:
                    continue
                found = RunEvidence.read(folder / RUNS / run["id"])
                evidence.append(found)
                problems += _another_run(found, run, entry)
                spec = RunSpec(round_id, found.run_id, found.kind, int(run["repeat"]), int(run["attempt"]), sha256)
                problems += _other_draws(found, prompts.of(found.kind, seed, spec.label), seed, spec.label, profile)
                if found.kind == "perturbed":
                    repeat = int(run["repeat"])
                    if repeat not in others:
                        changed = Path(scratch) / str(repeat)
                        perturbed_model(where, changed, seed.generator("perturbed", repeat))
                        others[repeat] = JudgeReference(changed)
                    perturbed[found.run_id] = others[repeat]
            problems += _missing_runs(profile, entry.name, runs, sha256)
            verdict = judge_case(Case(profile, entry.spec, evidence, reference, perturbed))
            verdicts[entry.name] = verdict
            if claimed.get(sha256) != verdict.status:
                problems.append(f"{entry.name}: the pack says {claimed.get(sha256)}, its evidence {verdict.status}")
    return Verified(round_id, verdicts, tuple(problems))


def _another_run(found: RunEvidence, run: dict[str, Any], entry: Entry) -> list[str]:
    """Evidence that is not that of the run whose name it has, or whose time is not what its requests took."""
    problems = []
    is_this = (found.run_id, found.kind, found.void, found.entry_sha256, found.commit, found.dialect)
    should_be = (run["id"], run["kind"], run["state"] == "voided", run["entry"], entry.spec.commit, entry.spec.dialect)
    if is_this != should_be:
        problems.append(f"run {run['id']}: its evidence is that of another run")
    ends = [record.finished_s for record in found.records if record.finished_s is not None]
    if found.records and found.duration_s != max(ends, default=0.0):
        problems.append(f"run {run['id']}: its time is not that of its requests")
    return problems


def _missing_runs(profile: Profile, name: str, runs: list[dict[str, Any]], sha256: str) -> list[str]:
    """Runs of the profile that the pack has not exactly once: leaving one out would hide what was found in it."""
    done = Counter((run["kind"], run["repeat"]) for run in runs if run["entry"] == sha256 and run["state"] == "done")
    wanted = [(kind, repeat) for kind, count in run_kinds(profile).items() for repeat in range(count)]
    return [
        f"{name}: {kind} run {repeat + 1} is there {done[kind, repeat]} times"
        for kind, repeat in wanted
        if done[kind, repeat] != 1
    ]


def _wrong_hashes(folder: Path) -> list[str]:
    """Files that differ from `SHA256SUMS`, are missing, or are not in it."""
    try:
        lines = (folder / HASHES_FILE).read_text(encoding="utf-8").splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return [f"{HASHES_FILE} is missing or malformed"]
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    problems = [f"{name} is missing" for name in sorted(set(listed) - set(found))]
    for name in sorted(set(found) - {HASHES_FILE}):
        with found[name].open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if listed.get(name) != digest:
            problems.append(f"{name} is not the file that was packed" if name in listed else f"{name} is not listed")
    return problems


def _other_draws(
    run: RunEvidence, requests: list[tuple[str, str, int]], seed: RoundSeed, label: str, profile: Profile
) -> list[str]:
    """What was drawn in another way than the seed says: nonce, prompts and their order, positions."""
    problems = []
    if run.nonce != seed.derive("nonce", label).hex():
        problems.append(f"run {run.run_id}: its nonce does not follow from the seed")
    if run.records and [(r.id, r.prompt, r.max_tokens) for r in run.records] != requests:
        problems.append(f"run {run.run_id}: prompts or their order do not follow from the seed")
    lengths = {r.id: len(r.token_ids) for r in run.records if r.status == "completed" and r.token_ids}
    if run.commit and run.records:
        wanted = draw_positions(lengths, seed.derive("positions", label), profile.reveal_rows)
        if run.positions != wanted:
            problems.append(f"run {run.run_id}: the revealed positions do not follow from the seed")
    return problems
