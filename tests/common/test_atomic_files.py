"""A file is whole or as it was; what cannot be written is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import isologit
from isologit.common.files import require_writable, write_atomically, write_json, write_text
from isologit.errors import OutputFolderError


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_everyone_may_read_it(tmp_path: Path) -> None:
    write_text(tmp_path / "file", ["a", "b"])
    assert (tmp_path / "file").read_text() == "ab"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_lone_surrogate_is_escaped_as_json_escapes_it(tmp_path: Path) -> None:
    value = {"text": "\ud800 \U0001f600 é"}
    write_json(tmp_path / "new" / "file", value)
    content = (tmp_path / "new" / "file").read_bytes()
    assert json.loads(content) == value
    assert "\U0001f600".encode() in content


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="cannot be written"):
        write_json(tmp_path / "file" / "inner.json", {})


def test_a_place_can_be_tried_beforehand(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "file.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("kept")
    require_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    for place in (tmp_path / "file" / "inner.json", tmp_path / "new"):
        with pytest.raises(OutputFolderError, match="cannot be written"):
            require_writable(place)


def test_there_is_one_atomic_writer() -> None:
    """Whoever else makes a temporary file is a second one. Inverse: the search finds the one there is."""
    source = Path(isologit.__file__).parent
    makes_files = re.compile(r"mkstemp|NamedTemporaryFile")
    makers = {path.name for path in source.rglob("*.py") if makes_files.search(path.read_text(encoding="utf-8"))}
    assert makers == {"files.py"}
