"""Reports of a finished round, from database and evidence: an HTML page and a Markdown answer for each entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from isologit.common.files import write_text
from isologit.judge.board import Board, BoardError, read_board
from isologit.judge.database import Database, VerdictRow
from isologit.judge.entry import Entry
from isologit.judge.pages import board_page, entry_markdown, entry_page
from isologit.judge.round import ENTRIES

REPORTS = "reports"
_SHOWN_BYTES = 64 << 10  # of a config file or a team's report


@dataclass(frozen=True)
class EntryReport:
    """The two forms of one entry's report."""

    html: str
    markdown: str


def entry_report(database: Database, board: Board, sha256: str) -> EntryReport:
    """The report of an entry of a round. Raises BoardError when it was not judged yet."""
    with database.session() as session:
        rows = session.scalars(
            select(VerdictRow).where(VerdictRow.round_id == board.round_id, VerdictRow.current.is_(True))
        )
        row = next((row for row in rows if row.entry.sha256 == sha256), None)
        if row is None or board.state != "finished":
            raise BoardError(f"{sha256[:12]}: no verdict in round {board.round_id} yet")
        verdict: dict[str, Any] = {"audits": row.audits, "findings": row.findings, "figures": row.figures}
    entry = Entry(database.folder / ENTRIES / sha256)
    facts = {
        "config_files": {name: _text(entry.folder / name) for name in entry.spec.config_files},
        "report": _text(entry.folder / entry.spec.report) if entry.spec.report else None,
    }
    return EntryReport(entry_page(board, sha256, verdict, facts), entry_markdown(board, sha256, verdict, facts))


def write_reports(database: Database, round_id: str) -> Path:
    """Write `reports/ROUND/`: `index.html` (the board), and a page and a Markdown file for each entry; returns it."""
    board = read_board(database, round_id)
    folder = database.folder / REPORTS / round_id
    folder.mkdir(parents=True, exist_ok=True)
    for row in board.rows:
        report = entry_report(database, board, row.sha256)
        write_text(folder / f"{row.sha256[:12]}.html", [report.html])
        write_text(folder / f"{row.sha256[:12]}.md", [report.markdown])
    links = {row.sha256: f"{row.sha256[:12]}.html" for row in board.rows}
    write_text(folder / "index.html", [board_page(board, links=links)])
    return folder


def _text(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.read(_SHOWN_BYTES).decode("utf-8", errors="replace")
