"""The pages in a real browser, at 360 pixels and on a desktop, light and dark: readable, inert, and complete."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
import uvicorn
from tests.judge import boards
from tests.judge.browser import browser, chromium, look

from isologit.judge import web
from isologit.judge.board import Board
from isologit.judge.pages import entry_page
from isologit.judge.reports import EntryReport

BOARDS = {"finished": boards.finished, "running": boards.running, "hostile": boards.hostile}
PAGES = ["rounds/finished", "rounds/running", "rounds/hostile", "rounds/finished/entries/-1",
         "rounds/finished/entries/0", "rounds/hostile/entries/-1"]  # fmt: skip
READABLE = 4.5  # of the contrast, as WCAG 2 asks for text


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if chromium() is None:
        pytest.skip("no Chromium here")
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The judge's own application over boards that need no round."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(web, "read_board", lambda database, round_id=None: BOARDS[round_id or "finished"]())
        patched.setattr(web, "entry_report", report)
        server = uvicorn.Server(uvicorn.Config(web.create_app(None), port=0, log_level="warning"))  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=30)


def report(database: None, board: Board, place: str) -> EntryReport:
    row = board.rows[int(place)]
    words = row.techniques[0] if board.title == boards.HOSTILE else "rows at most"
    finding = {"message": words, "run": words, "request": words, "index": 3}
    figures = {"tokens_rescored": 9, "tokens_fingerprinted": 9, "rows_revealed": 9, "bad_rows_at_most": 0.1}
    verdict = {
        "audits": {"fingerprint": "failed", words: words},
        "findings": [finding],
        "figures": {**figures, "open": [words]},
    }
    facts = {"config_files": {"a.yaml": words, boards.LONG: boards.LONG}, "report": words}
    return EntryReport(entry_page(board, row.sha256, verdict, facts), "")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_readable_and_asks_for_nothing(address: str, site: str, path: str, width: int, dark: bool) -> None:
    page = look(address, f"{site}/{path}", width=width, dark=dark)
    assert page.scroll_width <= page.width
    assert not page.wide
    assert page.contrast[0] >= READABLE, page.contrast
    assert page.requests == [f"{site}/{path}"]
    assert page.errors == []
    assert page.title != "owned"
    if "hostile" in path:
        assert "<script>" in page.text  # shown as it was written


def test_what_a_reader_finds_on_the_board(address: str, site: str) -> None:
    text = look(address, f"{site}/rounds/finished", width=360, dark=False).text
    parts = [
        text.index(words) for words in ("Entries", "Flat batches", "INVALID, and why", "From the contest's archive")
    ]
    assert parts == sorted(parts)
    assert text.index("213 of 1903 tokens") > parts[2]
    assert "gold" in text
    assert "1,218,004 tokens computed again by the reference" in text
    assert "23 of 64 runs are done." in look(address, f"{site}/rounds/running", width=360, dark=False).text


def test_every_answer_carries_the_policy(site: str) -> None:
    with urllib.request.urlopen(f"{site}/rounds/running") as answer:
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert answer.headers["Cache-Control"] == "no-store"
        assert b'http-equiv="refresh" content="5"' in answer.read()
