"""Points that a panel gives beside the time, with the organiser's weights, and the medals that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isologit.errors import UserError
from isologit.judge.board import Board, BoardError, read_board
from isologit.judge.database import Database, RoundRow
from isologit.judge.profile import Panel, Profile

MEDALS = ("gold", "silver", "bronze")


class PanelError(UserError):
    """Points that cannot be recorded."""


def record_points(database: Database, round_id: str | None, entry: str, points: Sequence[str]) -> None:
    """Store points such as `innovation=35` for an entry of a finished round. Raises PanelError or BoardError."""
    board = read_board(database, round_id)
    with database.session() as session:
        row = session.get(RoundRow, board.round_id)
        assert row is not None
        panel = Profile.model_validate(row.profile).panel
        if panel is None:
            raise PanelError(f"profile {board.profile} has no panel; add `panel` to its YAML")
        found = _parsed(points, panel)
        verdict = next((v for v in row.verdicts if v.current and v.entry.name == entry), None)
        if verdict is None:
            raise BoardError(f"{entry}: no such entry with a verdict in round {board.round_id}")
        verdict.panel = {**verdict.panel, **found}


def total(points: Mapping[str, int], panel: Mapping[str, int]) -> int | None:
    """The sum of the panel's points, or None while one is missing, and where there is no panel."""
    return sum(points[name] for name in panel) if panel and set(panel) <= set(points) else None


def medals(board: Board) -> dict[str, str]:
    """Gold, silver and bronze by entry hash: VALID entries by the panel's total, the faster first where it is equal."""
    totals = {row.sha256: total(row.panel, board.panel) for row in board.rows if row.status == "VALID"}
    order = [row.sha256 for row in board.rows if totals.get(row.sha256) is not None]
    order.sort(key=lambda sha256: -(totals[sha256] or 0))
    return dict(zip(order, MEDALS, strict=False))


def _parsed(points: Sequence[str], panel: Panel) -> dict[str, int]:
    most = panel.model_dump()
    found: dict[str, int] = {}
    for item in points:
        name, equals, number = item.partition("=")
        if not equals or name not in most or not number.isdecimal() or int(number) > most[name]:
            limits = ", ".join(f"{name}=0..{limit}" for name, limit in most.items())
            raise PanelError(f"{item}: points are given as {limits}")
        found[name] = int(number)
    return found
