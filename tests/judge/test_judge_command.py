"""What an organiser can get wrong on the command line: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isologit.cli.app import app
from isologit.judge.round import Judge


def refused(*arguments: object) -> str:
    """The one line of a command that was refused."""
    done = CliRunner().invoke(app, ["judge", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert f"{file}: cannot be made a folder (File exists)" in refused("run", "--folder", file)


def test_a_model_that_is_not_there_is_named_before_anything_is_built(tmp_path: Path) -> None:
    line = refused("run", "--model", tmp_path / "none", "--practice", "--folder", tmp_path / "judge")
    assert f"{tmp_path / 'none'}: no such folder" in line
    assert not (tmp_path / "judge" / "builds").exists()


def test_a_pack_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "none.zip: cannot be unpacked (No such file or directory)" in refused("verify", tmp_path / "none.zip")


def test_an_address_that_cannot_be_had_is_named_and_no_other_is_said(tmp_path: Path) -> None:
    Judge(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused("web", "--folder", tmp_path, "--port", port)
    assert "port must be between 0 and 65535" in refused("web", "--folder", tmp_path, "--port", 70000)


def test_a_judge_of_a_relative_folder_gives_entries_paths_that_hold_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    judge = Judge(Path("judge"))
    assert judge.folder == judge.database.folder == tmp_path / "judge"
