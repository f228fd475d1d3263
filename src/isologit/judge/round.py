"""A round: entries frozen, runs drawn and interleaved, each run to a final state, verdicts, the seed in the clear.

Owns the order of things. A judge that was killed goes on from the database and the run folders: a run is final when
its folder was renamed, and whatever was half done is done again without counting against the entry.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from isologit.common.environment import describe_environment
from isologit.errors import ModelError, UserError
from isologit.judge.audits import audits_of
from isologit.judge.audits.base import Case
from isologit.judge.build import build_entry
from isologit.judge.canary import canary_seconds, peak_flop_per_s
from isologit.judge.database import JUDGED, Database, EntryRow, RoundRow, RunRow, VerdictRow, now
from isologit.judge.entry import Entry, EntryError, look
from isologit.judge.evidence import EvidenceError, RunEvidence, RunKind
from isologit.judge.perturb import perturbed_model
from isologit.judge.profile import Profile
from isologit.judge.prompts import RoundPrompts, draw_prompts
from isologit.judge.reference import JudgeReference
from isologit.judge.run import RunSpec, perform_run
from isologit.judge.sandbox import sandbox_problem
from isologit.judge.seeds import RoundSeed
from isologit.judge.verdict import EntryVerdict, judge_case
from isologit.text.tokenizer import load_tokenizer
from isologit.workload import demo_model_path

ENTRIES, BUILDS, RUNS, PERTURBED = "entries", "builds", "runs", "perturbed"
LOCK_FILE = "judge.lock"
_AUDIT_REPEATS = 2  # runs of each kind besides the timed ones
_MOST_VOIDS = 2  # of one run: afterwards it counts, whatever the machine does


class JudgeError(UserError):
    """A round cannot be begun or continued."""


@dataclass(frozen=True)
class Progress:
    """What a judgement is doing, for whoever watches: runs that are final, runs in all, and the present one."""

    done: int
    total: int
    doing: str


Watcher = Callable[[Progress], None]


class Judge:
    """A judge's folder. model: weights, tokenizer and reference are read from there, never from an entry."""

    def __init__(self, folder: Path, watch: Watcher | None = None) -> None:
        self.folder = folder.resolve()  # entries run in folders of their own
        self.database = Database(self.folder, create=True)
        self._watch = watch or (lambda progress: None)

    # -- beginning ------------------------------------------------------------------------------------------------

    def begin(
        self,
        entries: Sequence[Entry],
        profile: Profile,
        *,
        model: Path | None = None,
        anchor: str | None = None,
        practice: bool = False,
        seed: RoundSeed | None = None,
    ) -> str:
        """Freeze the entries, draw the seed, publish its hash and queue every run; returns the round's id.

        Raises JudgeError when names come twice, the anchor is none of the entries, or there is no sandbox.
        """
        names = [entry.name for entry in entries]
        if not entries or len({look(name) for name in names}) < len(names):
            raise JudgeError(
                "a round needs at least one entry, and no two names that look alike; change `name` in entry.yaml"
            )
        if anchor is not None and anchor not in names:
            raise JudgeError(f"{anchor}: none of the entries has this name; the anchor is one of {', '.join(names)}")
        if not practice and (problem := sandbox_problem()) is not None:
            raise JudgeError(f"no sandbox: {problem}; install it, or judge with --practice, which is NOT RANKED")
        where = model_folder(profile, model)
        seed = seed or RoundSeed.draw()
        frozen = [self._freeze(entry) for entry in entries]
        for entry in frozen:
            self._build(entry, where, profile, practice=practice)
        round_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + seed.published[:6]
        with self.database.session() as session:
            rows = {name: self._entry_row(session, entry) for name, entry in zip(names, frozen, strict=True)}
            session.flush()
            round_row = RoundRow(
                id=round_id,
                profile=profile.model_dump(mode="json"),
                model=str(where),
                seed_sha256=seed.published,
                seed=seed.secret.hex(),
                anchor_id=rows[anchor or names[0]].id,
                practice=practice,
                environment=describe_environment(),
                state="running",
                created_at=now(),
                finished_at=None,
            )
            session.add(round_row)
            for place, (name, kind, repeat) in enumerate(order_of_runs(names, profile, seed)):
                session.add(_queued(round_id, rows[name].id, kind, repeat, float(place)))
        return round_id

    def _freeze(self, entry: Entry) -> Entry:
        """A copy of the entry under its hash; read-only, so that what runs is what was handed in."""
        target = self.folder / ENTRIES / entry.sha256()
        if not target.is_dir():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name in entry.files():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(entry.folder / name, partial / name, follow_symlinks=False)
            if Entry(partial).sha256() != target.name:
                raise EntryError(f"{entry.folder}: its files changed while they were copied; hand it in again")
            os.replace(partial, target)
        return Entry(target)

    def _build(self, entry: Entry, model: Path, profile: Profile, *, practice: bool) -> Path | None:
        target = self.folder / BUILDS / entry.folder.name
        return build_entry(entry, model, profile.limits, target, practice=practice)

    @staticmethod
    def _entry_row(session: Any, entry: Entry) -> EntryRow:
        digest = entry.sha256()
        row: EntryRow | None = session.scalar(select(EntryRow).where(EntryRow.sha256 == digest))
        if row is None:
            spec = entry.spec
            row = EntryRow(
                name=spec.name, team=spec.team, sha256=digest, techniques=list(spec.techniques), created_at=now()
            )
            session.add(row)
        return row

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, round_id: str) -> None:
        """Do every run that is not final, then judge. Called again after a kill, it goes on where it was.

        Raises JudgeError while another judge works in this folder.
        """
        with self._alone():
            profile = self._profile(round_id)
            self._recover(round_id)
            if not self._finished(round_id):
                self._complete(round_id, profile)

    def again(self, round_id: str) -> None:
        """Judge a round again by the audits of today: from its evidence, and from new runs where that does not do."""
        with self._alone():
            profile = self._profile(round_id)
            self._recover(round_id)
            self._queue_missing(round_id, profile)
            self._complete(round_id, profile)

    def _complete(self, round_id: str, profile: Profile) -> None:
        with self.database.session() as session:
            found = session.get(RoundRow, round_id)
            assert found is not None
            model, seed, practice = Path(found.model), RoundSeed.from_hex(found.seed), found.practice
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise ModelError(f"{model}: a judge needs the model's tokenizer beside its weights")
        prompts = draw_prompts(profile, seed, tokenizer)
        while True:
            while (run := self._next(round_id)) is not None:
                self._perform(run, profile, prompts, model, seed, practice)
            if not self._queue_damaged(round_id):
                break
        self._say(round_id, "checking against the reference")
        self.judge(round_id)
        with self.database.session() as session:
            session.execute(update(RoundRow).where(RoundRow.id == round_id).values(state="finished", finished_at=now()))
        self._say(round_id, "finished")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One judge at a time: two of them would do the same runs, and disturb each other's times."""
        with (self.folder / LOCK_FILE).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise JudgeError(
                    f"{self.folder}: another judge is at work here (process {file.read().strip()}); wait for its end, "
                    "or give another --folder"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def _profile(self, round_id: str) -> Profile:
        with self.database.session() as session:
            found = session.get(RoundRow, round_id)
            if found is None:
                raise JudgeError(f"{round_id}: no such round in {self.folder}")
            return Profile.model_validate(found.profile)

    def _finished(self, round_id: str) -> bool:
        with self.database.session() as session:
            return session.scalar(select(RoundRow.state).where(RoundRow.id == round_id)) == "finished"

    def _recover(self, round_id: str) -> None:
        """Give every run that a dead judge left `running` a final state: its folder is there, or it is done again."""
        with self.database.session() as session:
            for run in session.scalars(select(RunRow).where(RunRow.round_id == round_id, RunRow.state == "running")):
                shutil.rmtree(self._partial(run.id), ignore_errors=True)
                evidence = self._evidence(run.id)
                if evidence is None:
                    run.state, run.note = "abandoned", "the judge ended during this run; it was done again"
                    session.add(_again(run))
                else:
                    self._settle(session, run, evidence)

    def _queue_damaged(self, round_id: str) -> bool:
        """Queue runs again whose evidence can no longer be read; whether there were any."""
        found = False
        with self.database.session() as session:
            for run in session.scalars(select(RunRow).where(RunRow.round_id == round_id, RunRow.state.in_(JUDGED))):
                if self._evidence(run.id) is None:
                    found = True
                    shutil.rmtree(self.folder / RUNS / run.id, ignore_errors=True)
                    if run.state == "done":  # a voided one was done again already
                        session.add(_again(run))
                    run.state, run.note = "abandoned", "its evidence was damaged on the judge's disk; it was done again"
        return found

    def _queue_missing(self, round_id: str, profile: Profile) -> None:
        """Queue the runs that the audits of today want and the round has not."""
        with self.database.session() as session:
            found = session.get(RoundRow, round_id)
            assert found is not None
            entries = {run.entry.name: run.entry_id for run in found.runs}
            there = {(run.entry_id, run.kind, run.repeat) for run in found.runs}
            last = max((run.place for run in found.runs), default=0.0)
            for name, kind, repeat in order_of_runs(list(entries), profile, RoundSeed.from_hex(found.seed)):
                if (entries[name], kind, repeat) not in there:
                    last += 1.0
                    session.add(_queued(round_id, entries[name], kind, repeat, last))
                    found.state, found.finished_at = "running", None

    def _evidence(self, run_id: str) -> RunEvidence | None:
        try:
            return RunEvidence.read(self.folder / RUNS / run_id)
        except EvidenceError:
            return None

    def _partial(self, run_id: str) -> Path:
        return self.folder / RUNS / f"{run_id}.partial"

    def _next(self, round_id: str) -> RunRow | None:
        with self.database.session() as session:
            run: RunRow | None = session.scalar(
                select(RunRow)
                .where(RunRow.round_id == round_id, RunRow.state == "queued")
                .order_by(RunRow.place)
                .limit(1)
            )
            if run is not None:
                run.state = "running"
                _ = run.entry.sha256
            return run

    def _perform(
        self, run: RunRow, profile: Profile, prompts: RoundPrompts, model: Path, seed: RoundSeed, practice: bool
    ) -> None:
        self._say(run.round_id, f"{run.entry.name}: {run.kind} run {run.repeat + 1}")
        entry = Entry(self.folder / ENTRIES / run.entry.sha256)
        kind: RunKind = run.kind  # type: ignore[assignment]
        where = self._perturbed(run, model, seed) if kind == "perturbed" else model
        partial = self._partial(run.id)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        before = canary_seconds()
        spec = RunSpec(run.round_id, run.id, kind, run.repeat, run.attempt, run.entry.sha256)
        evidence, log = perform_run(
            spec,
            entry,
            profile,
            prompts,
            where,
            seed,
            partial,
            practice=practice,
            build=self._build(entry, model, profile, practice=practice),
        )
        evidence.canary_s = (before, canary_seconds())
        evidence.peak_flop_per_s = peak_flop_per_s()
        evidence.void = drifted(evidence.canary_s, profile) and self._may_be_void(run)
        (partial / "output.log").write_bytes(log)
        evidence.write(partial)
        os.replace(partial, self.folder / RUNS / run.id)
        with self.database.session() as session:
            row = session.get(RunRow, run.id)
            assert row is not None
            self._settle(session, row, evidence)

    def _may_be_void(self, run: RunRow) -> bool:
        """Whether this run may be done once more when the machine drifts; interruptions do not count."""
        same = (RunRow.round_id == run.round_id, RunRow.entry_id == run.entry_id, RunRow.kind == run.kind)
        voids = select(func.count()).where(*same, RunRow.repeat == run.repeat, RunRow.state == "voided")
        with self.database.session() as session:
            return run.kind == "timed" and (session.scalar(voids) or 0) < _MOST_VOIDS

    @staticmethod
    def _settle(session: Session, run: RunRow, evidence: RunEvidence) -> None:
        """The final state of a run whose evidence is there; a voided one is queued again."""
        run.state, run.duration_s = "done", evidence.duration_s
        if evidence.void:
            run.state, run.note = "voided", "the machine drifted during this run; it was repeated"
            session.add(_again(run))

    def _perturbed(self, run: RunRow, model: Path, seed: RoundSeed) -> Path:
        """The perturbed weights of a round's repeat, made once."""
        target = self.folder / PERTURBED / f"{run.round_id}-{run.repeat}"
        if not target.is_dir():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            perturbed_model(model, partial, seed.generator("perturbed", run.repeat))
            os.replace(partial, target)
        return target

    def _say(self, round_id: str, doing: str) -> None:
        with self.database.session() as session:
            states = list(session.scalars(select(RunRow.state).where(RunRow.round_id == round_id)))
        final = sum(state in ("done", "voided", "abandoned") for state in states)
        self._watch(Progress(final, len(states), doing))

    # -- judging --------------------------------------------------------------------------------------------------

    def judge(self, round_id: str) -> dict[str, EntryVerdict]:
        """Judge every entry of a round from its evidence; an older verdict stays, but is not the current one."""
        with self.database.session() as session:
            found = session.get(RoundRow, round_id)
            if found is None:
                raise JudgeError(f"{round_id}: no such round in {self.folder}")
            profile, model = Profile.model_validate(found.profile), Path(found.model)
            runs = [(run.entry, run.id, run.repeat) for run in found.runs if run.state in JUDGED]
        reference = JudgeReference(model)
        others: dict[int, JudgeReference] = {}
        verdicts: dict[str, EntryVerdict] = {}
        for entry in {entry.id: entry for entry, _, _ in runs}.values():
            evidence, perturbed = [], {}
            for owner, run_id, repeat in runs:
                if owner.id != entry.id:
                    continue
                run = RunEvidence.read(self.folder / RUNS / run_id)
                evidence.append(run)
                if run.kind == "perturbed":
                    if repeat not in others:
                        others[repeat] = JudgeReference(self.folder / PERTURBED / f"{round_id}-{repeat}")
                    perturbed[run.run_id] = others[repeat]
            spec = Entry(self.folder / ENTRIES / entry.sha256).spec
            verdict = judge_case(Case(profile, spec, evidence, reference, perturbed))
            verdicts[entry.name] = verdict
            with self.database.session() as session:
                session.execute(
                    update(VerdictRow)
                    .where(VerdictRow.round_id == round_id, VerdictRow.entry_id == entry.id)
                    .values(current=False)
                )
                found_dict = verdict.to_dict()
                session.add(
                    VerdictRow(
                        round_id=round_id,
                        entry_id=entry.id,
                        status=verdict.status,
                        findings=found_dict["findings"],
                        audits=verdict.audits,
                        figures=verdict.figures,
                        panel={},
                        judged_at=now(),
                        current=True,
                    )
                )
        return verdicts


def model_folder(profile: Profile, model: Path | None) -> Path:
    """The folder of the round's weights: the one given, or the demo model.

    Raises JudgeError where one is needed or the one given is no folder.
    """
    if model is not None:
        if not model.is_dir():
            raise JudgeError(f"{model}: no such folder; give the folder of the round's weights with --model DIR")
        return model.resolve()
    if profile.model == "demo":
        return demo_model_path()
    raise JudgeError(f"profile {profile.name} is for {profile.model}; give the folder of its weights with --model DIR")


def drifted(canary_s: tuple[float, float], profile: Profile) -> bool:
    """Whether the machine changed between the kernel before a run and the one after it by more than is allowed."""
    before_s, after_s = canary_s
    return abs(after_s / before_s - 1) > profile.canary_drift


def run_kinds(profile: Profile) -> dict[RunKind, int]:
    """Number of runs of an entry by kind: those that the profile's audits want, and the timed ones."""
    wanted: dict[RunKind, int] = {"timed": profile.repeats}
    for audit in audits_of(profile):
        for kind in audit.runs:
            wanted.setdefault(kind, _AUDIT_REPEATS)
    return wanted


def order_of_runs(names: Sequence[str], profile: Profile, seed: RoundSeed) -> Iterable[tuple[str, RunKind, int]]:
    """(entry, kind, repeat) in the order of the round: repeat by repeat, kinds and entries in random order in each.

    It does not depend on the order of the names.
    """
    generator, names, kinds = seed.generator("interleaving"), sorted(names), run_kinds(profile)
    listed = list(kinds)
    for repeat in range(max(kinds.values())):
        for place in generator.permutation(len(listed)):
            kind = listed[place]
            if repeat < kinds[kind]:
                for index in generator.permutation(len(names)):
                    yield names[index], kind, repeat


def _again(run: RunRow) -> RunRow:
    """The next attempt at a run, in the same place."""
    return _queued(run.round_id, run.entry_id, run.kind, run.repeat, run.place, run.attempt + 1)


def _queued(round_id: str, entry_id: int, kind: str, repeat: int, place: float, attempt: int = 1) -> RunRow:
    return RunRow(
        id=f"{round_id}-{entry_id}-{kind}-{repeat}-{attempt}",
        round_id=round_id,
        entry_id=entry_id,
        kind=kind,
        repeat=repeat,
        attempt=attempt,
        place=place,
        state="queued",
        note="",
        duration_s=None,
    )
