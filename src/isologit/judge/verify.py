"""A pack judged again offline: everything that was drawn, every verdict, time and rank, and what does not follow.

Knows a pack's files alone: no database, no judge's folder.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isologit.judge import strict_json
from isologit.judge.audits.base import Case
from isologit.judge.board import places
from isologit.judge.database import JUDGED
from isologit.judge.entry import Entry
from isologit.judge.evidence import RunEvidence
from isologit.judge.pack import HASHES_FILE, PACK_FORMAT, ROUND_FILE, PackError, shown_figures, unpack
from isologit.judge.perturb import perturbed_model
from isologit.judge.positions import draw_positions
from isologit.judge.profile import Profile
from isologit.judge.prompts import draw_prompts
from isologit.judge.reference import JudgeReference
from isologit.judge.round import ENTRIES, RUNS, drifted, model_folder, run_kinds
from isologit.judge.run import RunSpec
from isologit.judge.seeds import RoundSeed
from isologit.judge.statistics import Ranked
from isologit.judge.verdict import EntryVerdict, judge_case
from isologit.text.tokenizer import load_tokenizer

_ROUNDING = 1e-6  # of a score computed on another machine, relative


@dataclass(frozen=True)
class Verified:
    """What an offline judgement found: its own verdicts and ranks by entry, and everything that the pack has otherwise.

    ranks: of entries that have one; none in practice mode.
    """

    round_id: str
    verdicts: dict[str, EntryVerdict]
    ranks: dict[str, int]
    problems: tuple[str, ...]


def verify_pack(pack: Path, *, model: Path | None = None) -> Verified:
    """Judge a pack again: hashes, seed, prompts and their order, nonces, positions, all verdicts, and times and ranks.

    Raises PackError when it cannot be read at all; what merely does not agree is in `problems`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(pack, folder)
        return verify_folder(folder, model)


def verify_folder(folder: Path, model: Path | None) -> Verified:
    """`verify_pack` for a pack that is unpacked already."""
    problems = wrong_hashes(folder)
    try:
        about = strict_json.loads((folder / ROUND_FILE).read_bytes())
        if about["format"] != PACK_FORMAT:
            raise PackError(f"{ROUND_FILE}: of format {about['format']}; this judge reads {PACK_FORMAT}")
        profile, seed = Profile.model_validate(about["profile"]), RoundSeed.from_hex(about["seed"])
        runs, claimed = about["runs"], {v["entry"]: v["status"] for v in about["verdicts"]}
        said_places = {str(place["entry"]): dict(place) for place in about["places"]}
        round_id, anchor, practice = str(about["round_id"]), str(about["anchor"]), bool(about["practice"])
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
    names: dict[str, str] = {}
    times_s: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        others: dict[int, JudgeReference] = {}
        for sha256 in sorted({run["entry"] for run in runs} | set(claimed)):
            entry = Entry(folder / ENTRIES / sha256)
            if entry.sha256() != sha256:
                problems.append(f"entry {sha256[:12]}: its files have another hash")
            evidence, perturbed, timed = [], {}, []
            for run in runs:
                if run["entry"] != sha256 or run["state"] not in JUDGED:
                    continue
                found = RunEvidence.read(folder / RUNS / run["id"])
                evidence.append(found)
                if found.kind == "timed" and not found.void and found.duration_s is not None and found.duration_s > 0:
                    timed.append((int(run["repeat"]), found.duration_s))
                problems += _another_run(found, run, entry, profile)
                spec = RunSpec(round_id, found.run_id, found.kind, int(run["repeat"]), int(run["attempt"]), sha256)
                problems += _other_draws(found, prompts.of(found.kind, seed, spec.label), seed, spec.label, profile)
                if found.kind == "perturbed":
                    repeat = int(run["repeat"])
                    if repeat not in others:
                        changed = Path(scratch) / str(repeat)
                        perturbed_model(where, changed, seed.generator("perturbed", repeat))
                        others[repeat] = JudgeReference(changed)
                    perturbed[found.run_id] = others[repeat]
            problems += missing_runs(profile, entry.name, runs, sha256)
            verdict = judge_case(Case(profile, entry.spec, evidence, reference, perturbed))
            verdicts[entry.name], names[sha256] = verdict, entry.name
            times_s[sha256] = [second for _, second in sorted(timed)]
            if claimed.get(sha256) != verdict.status:
                problems.append(f"{entry.name}: the pack says {claimed.get(sha256)}, its evidence {verdict.status}")
    valid = {sha256 for sha256, name in names.items() if verdicts[name].status == "VALID"}
    found_places = places(times_s, valid, anchor, profile.repeats)
    problems += _other_places(said_places, found_places, times_s, names, practice=practice)
    ranks = {} if practice else {names[sha256]: place.rank for sha256, place in found_places.items()}
    return Verified(round_id, verdicts, ranks, tuple(problems))


def _other_places(
    said: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Ranked],
    times_s: Mapping[str, Sequence[float]],
    names: Mapping[str, str],
    *,
    practice: bool,
) -> list[str]:
    """Ranks, times and figures of the board that do not follow from the runs of all entries and the verdicts."""
    problems = []
    for sha256, name in names.items():
        shown, place = said.get(sha256), found.get(sha256)
        rank = None if place is None or practice else place.rank
        claimed = None if shown is None else shown.get("rank")
        if claimed != rank:
            problems.append(f"{name}: the pack says {_rank(claimed)}, its evidence {_rank(rank)}")
        if shown is None or place is None:
            continue
        if shown.get("times_s") != times_s[sha256]:
            problems.append(f"{name}: the times in the pack are not those of its runs")
        for what, value in shown_figures(place.score).items():
            if not _same(shown.get(what), value):
                problems.append(f"{name}: the pack says {what} {shown.get(what)}, its runs give {value:.6g}")
    return problems


def _rank(rank: object) -> str:
    return "no rank" if rank is None else f"rank {rank}"


def _same(claimed: object, value: float) -> bool:
    return isinstance(claimed, int | float) and math.isclose(claimed, value, rel_tol=_ROUNDING)


def _another_run(found: RunEvidence, run: dict[str, Any], entry: Entry, profile: Profile) -> list[str]:
    """Evidence that is not that of the run whose name it has, or whose time is not what its requests took, or which was
    left out of the ranking without a reason."""
    problems = []
    is_this = (found.run_id, found.kind, found.void, found.entry_sha256, found.commit, found.dialect)
    should_be = (run["id"], run["kind"], run["state"] == "voided", run["entry"], entry.spec.commit, entry.spec.dialect)
    if is_this != should_be:
        problems.append(f"run {run['id']}: its evidence is that of another run")
    if found.void and (found.canary_s is None or not drifted(found.canary_s, profile)):
        problems.append(f"run {run['id']}: its time does not count, but the machine did not drift")
    ends = [record.finished_s for record in found.records if record.finished_s is not None]
    if found.records and found.duration_s != max(ends, default=0.0):
        problems.append(f"run {run['id']}: its time is not that of its requests")
    return problems


def missing_runs(profile: Profile, name: str, runs: list[dict[str, Any]], sha256: str) -> list[str]:
    """Runs of the profile that the pack has not exactly once: leaving one out would hide what was found in it."""
    done = Counter((run["kind"], run["repeat"]) for run in runs if run["entry"] == sha256 and run["state"] == "done")
    wanted = [(kind, repeat) for kind, count in run_kinds(profile).items() for repeat in range(count)]
    return [
        f"{name}: {kind} run {repeat + 1} is there {done[kind, repeat]} times"
        for kind, repeat in wanted
        if done[kind, repeat] != 1
    ]


def wrong_hashes(folder: Path) -> list[str]:
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
