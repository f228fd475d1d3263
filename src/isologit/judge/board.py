"""The one ranking: what terminal, JSON and page show comes from here, so that none of them can be stale or differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from statistics import median
from typing import Any

import yaml
from sqlalchemy import select

from isologit.errors import UserError
from isologit.judge.database import FINAL, Database, RoundRow, RunRow, VerdictRow
from isologit.judge.statistics import Ranked, Score, rank


class BoardError(UserError):
    """There is nothing to show."""


@dataclass(frozen=True)
class BoardRow:
    """An entry's line. rank: None where it is not ranked, and `reasons` say why. score: against the anchor.

    seen: what the checks went over, as counts; empty before the verdict.
    """

    name: str
    team: str
    sha256: str
    techniques: tuple[str, ...]
    rank: int | None
    tied_with: tuple[str, ...]
    status: str  # VALID | INVALID | NOT RANKED | RUNNING
    score: Score | None
    times_s: tuple[float, ...]
    reasons: tuple[str, ...]
    panel: dict[str, int]
    seen: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Past:
    """A time from the contest's archive; not measured here."""

    name: str
    seconds: float
    note: str


@dataclass(frozen=True)
class Board:
    """A round as it stands. seed: only when the round is finished. done, total: runs that are final, runs in all.

    doing: the run in progress, in words. panel: most points by what they are for; empty where there is no panel.
    """

    round_id: str
    profile: str
    title: str
    state: str
    practice: bool
    anchor: str
    seed_sha256: str
    seed: str | None
    created_at: str
    finished_at: str | None
    environment: dict[str, Any]
    done: int
    total: int
    repeated: int
    rows: tuple[BoardRow, ...]
    history: tuple[Past, ...]
    doing: str | None = None
    panel: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return asdict(self)


def read_board(database: Database, round_id: str | None = None) -> Board:
    """A round's board; the newest round's where none is named. Raises BoardError when there is none."""
    with database.session() as session:
        query = select(RoundRow).order_by(RoundRow.created_at.desc(), RoundRow.id.desc())
        found = session.get(RoundRow, round_id) if round_id else session.scalars(query).first()
        if found is None:
            raise BoardError(f"{round_id or database.folder}: no such round; list them with: isologit judge rounds")
        finished = found.state == "finished"
        verdicts = {v.entry_id: v for v in found.verdicts if v.current} if finished else {}
        entries = {run.entry_id: run.entry for run in found.runs}
        times = {
            entry.sha256: [run.duration_s for run in _timed(found.runs, entry_id) if run.duration_s]
            for entry_id, entry in entries.items()
        }
        valid = {entries[i].sha256 for i, verdict in verdicts.items() if verdict.status == "VALID"}
        ranked = places(times, valid, found.anchor.sha256, found.profile["repeats"])
        names = {entry.sha256: entry.name for entry in entries.values()}
        rows = []
        for entry_id, entry in entries.items():
            verdict, place = verdicts.get(entry_id), ranked.get(entry.sha256)
            rows.append(
                BoardRow(
                    name=entry.name,
                    team=entry.team,
                    sha256=entry.sha256,
                    techniques=tuple(entry.techniques),
                    rank=None if place is None or found.practice else place.rank,
                    tied_with=() if place is None else tuple(names[sha256] for sha256 in place.tied_with),
                    status=_status(verdict, found),
                    score=None if place is None else place.score,
                    times_s=tuple(times[entry.sha256]),
                    reasons=_reasons(verdict),
                    panel=verdict.panel if verdict else {},
                    seen=_seen(verdict),
                )
            )
        return Board(
            round_id=found.id,
            profile=found.profile["name"],
            title=found.profile["title"],
            state=found.state,
            practice=found.practice,
            anchor=found.anchor.name,
            seed_sha256=found.seed_sha256,
            seed=found.seed if finished else None,
            created_at=found.created_at,
            finished_at=found.finished_at,
            environment=found.environment,
            done=sum(run.state in FINAL for run in found.runs),
            total=len(found.runs),
            repeated=sum(run.state in ("voided", "abandoned") for run in found.runs),
            rows=tuple(sorted(rows, key=_order)),
            history=history(found.profile["name"]),
            doing=next((_doing(run) for run in found.runs if run.state == "running"), None),
            panel=found.profile.get("panel") or {},
        )


def places(
    times_s: Mapping[str, Sequence[float]], valid: Collection[str], anchor: str, repeats: int
) -> dict[str, Ranked]:
    """Places by entry of the VALID ones that have a time of every repeat; the board's, and a pack's judged again.

    times_s: seconds of the runs that count, in the repeats' order. An anchor that is not VALID still anchors; where its
    own times are not complete, the first VALID entry in the order of hashes does.
    """
    complete = [name for name in sorted(times_s) if len(times_s[name]) == repeats]
    ranked = [name for name in complete if name in valid]
    if not ranked:
        return {}
    return {place.name: place for place in rank(times_s, anchor if anchor in complete else ranked[0], ranked)}


def read_rounds(database: Database) -> list[tuple[str, str, str, str]]:
    """(id, profile, state, created at) of every round, the newest first."""
    with database.session() as session:
        rows = session.scalars(select(RoundRow).order_by(RoundRow.created_at.desc(), RoundRow.id.desc()))
        return [(row.id, row.profile["name"], row.state, row.created_at) for row in rows]


def changes(before: Board, after: Board) -> tuple[str, ...]:
    """A line for each entry whose verdict or rank differs between two boards of a round, in the order of the later."""
    was = {row.sha256: _standing(row) for row in before.rows}
    return tuple(
        f"{row.name}: {was[row.sha256]} -> {_standing(row)}" for row in after.rows if was[row.sha256] != _standing(row)
    )


def checked(seen: Mapping[str, int]) -> str:
    """`BoardRow.seen` in words."""
    return (
        f"{seen['tokens_rescored']:,} tokens computed again by the reference, {seen['tokens_fingerprinted']:,} "
        f"fingerprints compared, {seen['rows_revealed']:,} secret rows shown in full, "
        f"{seen['accusations']:,} accusation{'' if seen['accusations'] == 1 else 's'}"
    )


@cache
def history(profile: str) -> tuple[Past, ...]:
    """The contest's own times for a profile of that name, the fastest first."""
    found = yaml.safe_load(files("isologit.judge").joinpath("history.yaml").read_text(encoding="utf-8"))
    listed = found.get(profile.removeprefix("contest-"), [])
    return tuple(sorted((Past(**item) for item in listed), key=lambda past: past.seconds))


def _standing(row: BoardRow) -> str:
    return row.status if row.rank is None else f"{row.status}, rank {row.rank}"


def _doing(run: RunRow) -> str:
    return f"{run.entry.name}, {run.kind} run {run.repeat + 1}"


def _timed(runs: list[RunRow], entry_id: int) -> list[RunRow]:
    chosen = [run for run in runs if run.entry_id == entry_id and run.kind == "timed" and run.state == "done"]
    return sorted(chosen, key=lambda run: run.repeat)


def _status(verdict: VerdictRow | None, found: RoundRow) -> str:
    if verdict is None:
        return "RUNNING"
    if verdict.status == "INVALID":
        return "INVALID"
    return "NOT RANKED" if found.practice else "VALID"


def _reasons(verdict: VerdictRow | None) -> tuple[str, ...]:
    """One sentence for each kind of finding."""
    if verdict is None:
        return ()
    seen: dict[str, str] = {}
    for finding in verdict.findings:
        seen.setdefault(finding["code"], finding["message"])
    return tuple(seen.values())


def _seen(verdict: VerdictRow | None) -> dict[str, int]:
    """Tokens that the reference computed again, fingerprints compared, rows shown in full, and accusations."""
    if verdict is None:
        return {}
    counts = ("tokens_rescored", "tokens_fingerprinted", "rows_revealed")
    return {**{name: verdict.figures[name] for name in counts}, "accusations": len(verdict.findings)}


def _order(row: BoardRow) -> tuple[int, int, float, str]:
    """Ranked entries first, then practice and running ones, INVALID last; by time within a rank."""
    group = {"VALID": 0, "NOT RANKED": 1, "RUNNING": 2, "INVALID": 3}[row.status]
    seconds = median(row.times_s) if row.times_s else float("inf")
    return group, row.rank or 0, seconds, row.name
