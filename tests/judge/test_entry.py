"""Entries and profiles: what is accepted, and what is refused with the place named."""

from __future__ import annotations

from pathlib import Path

import pytest

from isologit.errors import ConfigError
from isologit.judge.audits import AUDITS, audits_of
from isologit.judge.entry import Entry, EntryError
from isologit.judge.examples import example_entries
from isologit.judge.profile import Profile, bundled_profiles, load_profile

GOOD = 'name: Plain\ncommand: ["{python}", "{entry}/server.py", "--port", "{port}"]\n'


def entry(folder: Path, text: str) -> Entry:
    (folder / "entry.yaml").write_text(text, encoding="utf-8")
    return Entry(folder)


def test_the_command_is_filled_in(tmp_path: Path) -> None:
    made = entry(tmp_path, GOOD)
    words = made.command(port=81, model="/m", scratch="/s", entry="/e", build="/b", python="py")
    assert words == ["py", "/e/server.py", "--port", "81"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "YAML"),
        ("- a\n", "fields"),
        ("name: A\n", "command"),
        (GOOD + "comand: [x]\n", "comand"),
        (GOOD + "dialect: smtp\n", "dialect"),
        (GOOD + "config_files: [../../secret]\n", "inside"),
        (GOOD + "config_files: [/etc/passwd]\n", "inside"),
        (GOOD + "report: none.md\n", "none.md"),
        (GOOD + "health: ready\n", "health"),
        ('name: ""\ncommand: [x]\n', "name"),
        (f"name: {'x' * 81}\ncommand: [x]\n", "name"),
        ('name: "red\\e[31m"\ncommand: [x]\n', "name"),
    ],
)
def test_bad_entries_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(EntryError, match=said):
        entry(tmp_path, text)


def test_links_are_refused(tmp_path: Path) -> None:
    made = entry(tmp_path, GOOD)
    (tmp_path / "answers").symlink_to("/etc/hostname")
    with pytest.raises(EntryError, match="link"):
        made.sha256()


def test_the_hash_sees_every_byte_and_name(tmp_path: Path) -> None:
    made = entry(tmp_path, GOOD)
    seen = {made.sha256()}
    (tmp_path / "a").write_text("1")
    seen.add(made.sha256())
    (tmp_path / "a").write_text("2")
    seen.add(made.sha256())
    (tmp_path / "a").rename(tmp_path / "b")
    seen.add(made.sha256())
    assert len(seen) == 4


def test_every_bundled_profile_and_entry_can_be_read() -> None:
    assert {"smoke", "offline", "contest-phase1", "contest-phase2"} <= set(bundled_profiles())
    for name in bundled_profiles():
        assert load_profile(name).name == name
    assert next(made.name for made in example_entries()) == "Plain numpy"


@pytest.mark.parametrize(
    ("text", "said"),
    [("name: a\ntitle: b\nrepeats: 0\n", "repeats"), ("name: a\ntitle: b\nrepeat: 3\n", "repeat"), ("[", "YAML")],
)
def test_bad_profiles_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_profile(str(tmp_path / "p.yaml"))


def test_an_unknown_profile_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="smoke"):
        load_profile("finale")


def test_audits_are_chosen_by_name() -> None:
    assert [audit.name for audit in audits_of(Profile(name="a", title="b", audits=("gaps", "endings")))] == [
        "endings",
        "gaps",
    ]
    assert len(audits_of(Profile(name="a", title="b"))) == len(AUDITS)
    with pytest.raises(ConfigError, match="no audit"):
        audits_of(Profile(name="a", title="b", audits=("nothing",)))
