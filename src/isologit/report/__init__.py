"""A run or a load measurement as one self-contained page, made from result files only."""

from __future__ import annotations

from pathlib import Path

from isologit.report import load_page, page
from isologit.report.load_results import read_load_results

__all__ = ["render_report"]


def render_report(folder: Path) -> Path:
    """Write `folder/report.html` from what the folder holds, a run's files or load results, and return its path.

    Raises OutputFolderError when it holds neither or a file is damaged.
    """
    if not (folder / "result.json").exists() and read_load_results(folder):
        return load_page.render_load_report(folder)
    return page.render_report(folder)
