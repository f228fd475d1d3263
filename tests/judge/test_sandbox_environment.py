"""What the organiser's own environment holds is in no entry's reach, by no process of the sandbox."""

from __future__ import annotations

from pathlib import Path

import pytest

from isologit.judge.entry import Entry
from isologit.judge.process import EntryProcess
from isologit.judge.profile import Limits
from isologit.judge.sandbox import sandbox_problem
from isologit.workload import demo_model_path

ALL_ENVIRONMENTS = """
import pathlib
for file in pathlib.Path("/proc").glob("[0-9]*/environ"):
    try:
        print(file, file.read_text())
    except OSError:
        pass
"""


def test_no_process_of_the_sandbox_shows_the_organisers_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (problem := sandbox_problem()) is not None:
        pytest.skip(problem)
    monkeypatch.setenv("ORGANISERS_SECRET", "hunter2")
    folder = tmp_path / "entry"
    folder.mkdir()
    (folder / "entry.yaml").write_text('name: e\ncommand: ["{python}", "{entry}/look.py"]\n')
    (folder / "look.py").write_text(ALL_ENVIRONMENTS)
    process = EntryProcess(Entry(folder), demo_model_path(), Limits(start_s=20), tmp_path, practice=False)
    with process.running() as running:
        assert running is None
    assert b"/proc/1/environ" in process.log
    assert b"hunter2" not in process.log
