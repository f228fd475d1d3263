"""What an entry's two reports say."""

from __future__ import annotations

from tests.judge import boards

from isologit.judge.pages import entry_markdown, entry_page


def test_an_entry_without_config_files_says_so_in_both_reports() -> None:
    board = boards.finished()
    verdict = {
        "audits": {},
        "findings": [],
        "figures": {"rows_revealed": 9, "bad_rows_at_most": 0.1, "open": []},
    }
    for files, said in (({}, True), ({"a.yaml": "slots: 8"}, False)):
        facts = {"config_files": files, "report": None}
        for write in (entry_page, entry_markdown):
            assert ("names no config files" in write(board, board.rows[0].sha256, verdict, facts)) is said
