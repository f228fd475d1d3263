"""An entry: what a team hands in. A folder with `entry.yaml`, or in practice mode only an address.

Owns the file's fields, their limits, and the hash that ties an entry to what was judged. Runs nothing.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from isologit.errors import UserError

ENTRY_FILE = "entry.yaml"
PLACEHOLDERS = ("{port}", "{model}", "{entry}", "{scratch}", "{build}", "{python}")
_ALIKE = frozenset({"LATIN", "GREEK", "CYRILLIC"})
_MOST_FILES, _MOST_BYTES = 10_000, 1 << 30

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80)]
Technique = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=120)]


class EntryError(UserError):
    """An entry's folder or `entry.yaml` cannot be used."""


class EntrySpec(BaseModel):
    """`entry.yaml`. Unknown fields are refused, so that a typing error is not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    team: Annotated[str, StringConstraints(max_length=80)] = ""
    command: tuple[str, ...] = Field(min_length=1, max_length=64)
    build: tuple[str, ...] = Field(default=(), max_length=64)
    dialect: Literal["openai", "llm-serving", "tgi"] = "openai"
    served_model: Annotated[str, StringConstraints(max_length=120)] = "isologit"
    commit: bool = False
    health: str = "/health"
    config_files: tuple[str, ...] = Field(default=(), max_length=32)
    techniques: tuple[Technique, ...] = Field(default=(), max_length=32)
    report: str | None = None

    @field_validator("name", "team", "served_model")
    @classmethod
    def _printable(cls, text: str) -> str:
        # NOTE: names are shown on terminals; markup is escaped where it is shown, control characters have no use.
        if not text.isprintable():
            raise ValueError("must hold printable characters only")
        alphabets = {unicodedata.name(c, "").split(" ")[0] for c in text if c.isalpha()}
        if len(alphabets & _ALIKE) > 1:
            raise ValueError("must not mix alphabets whose letters look alike (Latin, Greek, Cyrillic)")
        return text

    @field_validator("techniques")
    @classmethod
    def _printable_each(cls, listed: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(cls._printable(text) for text in listed)

    @field_validator("config_files")
    @classmethod
    def _inside(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} must lie inside the entry's folder")
        return names

    @field_validator("health")
    @classmethod
    def _a_path(cls, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError("must begin with /")
        return path


class Entry:
    """An entry that can be started: its spec and its folder.

    Raises EntryError when a file is missing, not readable or not what it should be.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / ENTRY_FILE
        if not file.is_file():
            raise EntryError(f"{file}: no such file; an entry is a folder that holds {ENTRY_FILE}")
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise EntryError(f"{file}: not a YAML file ({' '.join(str(error).split())})") from None
        if not isinstance(found, dict):
            raise EntryError(f"{file}: must hold fields such as name and command")
        try:
            self.spec = EntrySpec.model_validate(found)
        except ValidationError as error:
            raise EntryError(f"{file}: {first_problem(error)}") from None
        self.folder = folder.resolve()
        for name in (*self.spec.config_files, *([self.spec.report] if self.spec.report else [])):
            if not (self.folder / name).is_file():
                raise EntryError(f"{file}: names {name}, which is not in the folder")

    @property
    def name(self) -> str:
        """As written in `entry.yaml`; it may hold markup, so it is escaped wherever it is shown."""
        return self.spec.name

    def files(self) -> dict[str, str]:
        """SHA-256 of every file by its path inside the folder.

        Raises EntryError for a link, a special file, or more than 10,000 files or 1 GiB.
        """
        found: dict[str, str] = {}
        total = 0
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise EntryError(f"{self.folder}: {name} is a link or a special file; an entry holds plain files only")
            if path.is_dir() or "__pycache__" in path.relative_to(self.folder).parts:
                continue
            total += path.stat().st_size
            if len(found) >= _MOST_FILES or total > _MOST_BYTES:
                raise EntryError(f"{self.folder}: holds more than {_MOST_FILES} files or {_MOST_BYTES >> 30} GiB")
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def sha256(self) -> str:
        """One hash of all files and their names."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in self.files().items())
        return hashlib.sha256(lines.encode()).hexdigest()

    def command(self, *, port: int, model: str, scratch: str, entry: str, build: str, python: str) -> list[str]:
        """The command with its placeholders filled in."""
        return _filled(self.spec.command, str(port), model, entry, scratch, build, python)

    def build_command(self, *, model: str, scratch: str, entry: str, build: str, python: str) -> list[str]:
        """What makes the entry's `{build}` folder, once, before the round; it serves nothing, so it has no port."""
        return _filled(self.spec.build, "{port}", model, entry, scratch, build, python)


def _filled(words: Sequence[str], *values: str) -> list[str]:
    """The words with the placeholders' values in place, in the order of `PLACEHOLDERS`."""
    filled = []
    for word in words:
        for placeholder, value in zip(PLACEHOLDERS, values, strict=True):
            word = word.replace(placeholder, value)
        filled.append(word)
    return filled


def look(name: str) -> str:
    """What two names have in common that people would take for each other: width, case and spaces do not count."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def first_problem(error: ValidationError) -> str:
    """One line: where the first problem is and what it is."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"
