"""The output folder: who may write in it, the names in it, and whole-or-nothing writing.

Knows the files' names but not what they mean.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from isologit.common.files import json_text, write_text
from isologit.errors import OutputFolderError

RESULT = "result.json"
CERTIFICATE = "certificate.json"
OUTPUTS = "outputs.jsonl"
STEPS = "steps.jsonl"
LOGITS = "logits"
REPORT = "report.html"
STATE = "run.partial.json"
PARTIAL_OUTPUTS = "outputs.partial.jsonl"
PARTIAL_STEPS = "steps.partial.jsonl"
PARTIAL_ROWS = "logits.partial.bin"

_LOCK = ".lock"
_LOGITS_DRAFT = ".logits.partial"
_WHOLE = (RESULT, CERTIFICATE, OUTPUTS, STEPS, LOGITS, REPORT)
_PARTIAL = (STATE, PARTIAL_OUTPUTS, PARTIAL_STEPS, PARTIAL_ROWS, _LOGITS_DRAFT)


class OutputFolder:
    """A folder held by this run alone, from `claim` to `release`."""

    def __init__(self, path: Path, lock: int, created: list[Path], *, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self._lock = lock
        self._created = created  # folders that were not there before, innermost first

    @classmethod
    def claim(cls, path: Path, *, resume: bool) -> OutputFolder:
        """Lock the folder, making it if need be.

        Raises OutputFolderError when another run holds it, it holds a finished run, it holds an interrupted run and
        `resume` is false, there is nothing to resume, or it cannot be written.
        """
        if resume and not path.is_dir():
            raise OutputFolderError(f"{path}: no such folder, so nothing to resume; run without --resume")
        created = _make(path)
        try:
            lock = _lock(path)
        except BaseException:
            _remove_empty(created)
            raise
        folder = cls(path, lock, created, resumed=resume)
        try:
            folder._refuse_used(resume)
        except BaseException:
            folder.release()
            raise
        return folder

    def _refuse_used(self, resume: bool) -> None:
        if (self.path / RESULT).exists():
            raise OutputFolderError(f"{self.path}: holds a finished run; choose another folder or delete this one")
        if resume and not (self.path / STATE).exists():
            raise OutputFolderError(f"{self.path}: holds no interrupted run; run without --resume")
        if not resume:
            if (self.path / STATE).exists():
                raise OutputFolderError(
                    f"{self.path}: holds an interrupted run; add --resume to continue it, or choose another folder"
                )
            for name in (*_WHOLE, *_PARTIAL):
                if (self.path / name).exists():
                    raise OutputFolderError(f"{self.path}: already holds {name}; choose another folder")

    def release(self) -> None:
        """Unlock; a folder that was made for this run and holds nothing goes away."""
        (self.path / _LOCK).unlink(missing_ok=True)
        os.close(self._lock)
        _remove_empty(self._created)

    def discard_partial(self) -> None:
        """Delete what a run keeps only to be resumed. NOTE: the state goes first, for without it nothing resumes."""
        for name in _PARTIAL:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_json(self, name: str, thing: Mapping[str, Any]) -> None:
        """Replace a file with one indented JSON object."""
        write_text(self.path / name, [json_text(thing)])

    def write_lines(self, name: str, things: Iterable[Mapping[str, Any]]) -> None:
        """Replace a file with one JSON object a line."""
        write_text(self.path / name, (json_line(thing) for thing in things))

    def write_logits(self, write: Callable[[Path], object]) -> None:
        """Let `write(folder)` fill a folder, then make it `logits/`; one that is there already is kept."""
        if (self.path / LOGITS).exists():
            return
        draft = self.path / _LOGITS_DRAFT
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir()
        write(draft)
        draft.replace(self.path / LOGITS)


def json_line(thing: Mapping[str, Any]) -> str:
    """One object as a line of a JSONL file; lone surrogates are escaped, for UTF-8 has no form for them."""
    text = json.dumps(thing, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(thing, allow_nan=False)
    return text + "\n"


def _make(path: Path) -> list[Path]:
    """Make the folder and its parents; returns those that were not there, innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise OutputFolderError(
            f"{path}: cannot be made a folder ({error.strerror}); choose another with --output"
        ) from error
    return missing


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _lock(path: Path) -> int:
    """Hold `.lock` until its descriptor is closed, whatever ends the process."""
    file = path / _LOCK
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputFolderError(
                f"{path}: cannot be written ({error.strerror}); choose another folder with --output"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise OutputFolderError(
                f"{path}: in use by another run (process {owner}); wait for it or choose another folder"
            ) from None
        # NOTE: between open and flock the last owner may have deleted the file; locked, it would guard nothing.
        try:
            ours = os.fstat(descriptor).st_ino == file.stat().st_ino
        except FileNotFoundError:
            ours = False
        if ours:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)
