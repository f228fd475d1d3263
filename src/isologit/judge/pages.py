"""The board and an entry's report as HTML: one self-contained page each, no script, nothing from elsewhere."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from isologit.judge.audits import AUDITS
from isologit.judge.board import Board, checked
from isologit.judge.panel import medals
from isologit.judge.statistics import LEAST_APART

_MARKUP = re.compile(r"[\\`*_\[\]<>#|!&~:@]")

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""Content security policy of every page: inline style, and nothing else at all."""


def board_page(board: Board, *, links: dict[str, str], refresh_s: int | None = None) -> str:
    """links: address of an entry's report by its hash. refresh_s: the page loads itself again while a round runs."""
    longest = max((row.score.high for row in board.rows if row.score is not None), default=1.0)
    return (
        _templates()
        .get_template("board.html.j2")
        .render(
            board=board,
            links=links,
            refresh_s=refresh_s,
            longest=longest,
            medals=medals(board),
            policy=POLICY,
            least_apart=LEAST_APART,
        )
    )


def entry_page(board: Board, row_sha256: str, verdict: dict[str, Any], facts: dict[str, Any]) -> str:
    """An entry's report. verdict: as `VerdictRow` holds it. facts: config files, techniques and log, by name."""
    row = next(row for row in board.rows if row.sha256 == row_sha256)
    titles = {name: audit.title for name, audit in AUDITS.items()}
    return (
        _templates()
        .get_template("entry.html.j2")
        .render(board=board, row=row, verdict=verdict, facts=facts, titles=titles, policy=POLICY)
    )


def entry_markdown(board: Board, row_sha256: str, verdict: dict[str, Any], facts: dict[str, Any]) -> str:
    """The four answers the contest asked of an entry: techniques, settings, total time, environment."""
    row = next(row for row in board.rows if row.sha256 == row_sha256)
    return (
        _templates(markdown=True).get_template("entry.md.j2").render(board=board, row=row, verdict=verdict, facts=facts)
    )


@cache
def _templates(*, markdown: bool = False) -> Environment:
    environment = Environment(
        loader=PackageLoader("isologit.judge"),
        autoescape=not markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = lambda value: "–" if value is None else f"{value:.2f} s"
    environment.filters["when"] = lambda text: text.replace("T", " ").replace("+00:00", " UTC")
    environment.filters["checked"] = checked
    environment.filters["plain"] = _plain
    environment.filters["words"] = _words
    return environment


def _plain(text: str) -> str:
    """Without control characters, which a terminal or an editor would obey; one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _words(text: str) -> str:
    """Words and nothing else in Markdown: no markup, no link, no HTML."""
    return _MARKUP.sub(r"\\\g<0>", _plain(text))
