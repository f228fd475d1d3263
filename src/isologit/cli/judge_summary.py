"""The board on a terminal. Names are data: nothing in them is obeyed, by the terminal or by rich's markup."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isologit.judge.board import Board, BoardRow, checked
from isologit.judge.statistics import LEAST_APART

_STYLES = {"VALID": "green", "INVALID": "red", "NOT RANKED": "yellow", "RUNNING": "dim"}


def show_board(board: Board) -> None:
    """Print ranks, times and verdicts, the reasons under INVALID entries."""
    console = Console()
    console.print(_text(f"{board.title}: round {board.round_id}, {board.done} of {board.total} runs done"))
    if board.practice:
        console.print(_text("practice mode, without a sandbox: NOT RANKED"))
    table = Table(box=None, pad_edge=False)
    for heading in ("rank", "entry", "median", "of anchor", "95 % interval", "verdict"):
        table.add_column(heading, justify="right" if heading in ("rank", "median", "of anchor") else "left")
    for row in board.rows:
        table.add_row(*_cells(row))
    console.print(table)
    for row in board.rows:
        if row.tied_with and row.score is not None:
            few = f"; that takes {LEAST_APART} repeats" if row.score.repeats < LEAST_APART else ""
            console.print(_text(f"{row.name}: not told apart from {', '.join(row.tied_with)}{few}"))
        if row.seen:
            console.print(_text(f"{row.name}: {checked(row.seen)}"))
        for reason in row.reasons:
            console.print(_text(f"{row.name}: INVALID: {reason}"))


def _cells(row: BoardRow) -> list[Text]:
    score = row.score
    figures = ["", "", ""]
    if score is not None:
        figures = [f"{score.median_s:.2f} s", f"{score.ratio:.3f}", f"{score.low:.3f} to {score.high:.3f}"]
    rank = "" if row.rank is None else str(row.rank)
    return [_text(rank), _text(row.name), *map(_text, figures), Text(row.status, _STYLES.get(row.status, ""))]


def _text(words: str) -> Text:
    return Text("".join(c if c.isprintable() else "?" for c in words))
