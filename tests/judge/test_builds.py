"""What an entry compiles before a round: made once, in the sandbox, within limits, and only read afterwards."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from isologit.judge.build import build_entry
from isologit.judge.entry import Entry, EntryError
from isologit.judge.profile import Limits
from isologit.judge.sandbox import inside, sandbox_problem, sandboxed
from isologit.workload import demo_model_path

PRACTICE = pytest.mark.parametrize("practice", [False, True], ids=["sandbox", "practice"])


@pytest.fixture(autouse=True)
def _sandbox(request: pytest.FixtureRequest) -> None:
    if not request.node.callspec.params.get("practice") and (problem := sandbox_problem()) is not None:
        pytest.skip(problem)


def entry(folder: Path, *build: str) -> Entry:
    folder.mkdir()
    about = {"name": "builder", "command": ["true"], "build": list(build)}
    (folder / "entry.yaml").write_text(yaml.safe_dump(about))
    return Entry(folder)


def built(tmp_path: Path, *build: str, practice: bool, **limits: float) -> Path:
    made = entry(tmp_path / "entry", *build)
    found = build_entry(made, demo_model_path(), Limits(**limits), tmp_path / "build", practice=practice)
    assert found is not None
    return found


@PRACTICE
def test_it_is_made_once_and_sees_entry_and_model(tmp_path: Path, practice: bool) -> None:
    command = "ls {entry} {model} > {build}/seen; date +%s%N > {build}/when"
    folder = built(tmp_path, "sh", "-c", command, practice=practice)
    assert {"entry.yaml", "config.json"} <= set((folder / "seen").read_text().split())
    when = (folder / "when").read_text()
    again = build_entry(Entry(tmp_path / "entry"), demo_model_path(), Limits(), folder, practice=practice)
    assert again == folder
    assert (folder / "when").read_text() == when


@PRACTICE
@pytest.mark.parametrize(
    ("command", "limits", "said"),
    [
        ("echo no compiler; exit 7", {}, "exit code 7: no compiler"),
        ("sleep 60", {"build_s": 0.5}, "longer than 0.5 s"),
        ("head -c 9000000 /dev/zero > {build}/large; sleep 60", {"scratch_gib": 0.005}, "more than 0.005 GiB"),
        ("yes; sleep 60", {"output_mib": 1}, "1 MiB of output"),
    ],
)
def test_what_goes_wrong_is_said_and_nothing_stays(
    tmp_path: Path, practice: bool, command: str, limits: dict[str, float], said: str
) -> None:
    with pytest.raises(EntryError, match=said):
        built(tmp_path, "sh", "-c", command, practice=practice, **limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry"]


@pytest.mark.parametrize("practice", [False])
def test_a_run_can_only_read_it(tmp_path: Path, practice: bool) -> None:
    folder = built(tmp_path, "touch", "{build}/kernel", practice=practice)
    view = inside()
    command = ["sh", "-c", f"ls {view.build}; touch {view.build}/more"]
    words, mounts = sandboxed(
        command, entry=tmp_path / "entry", model=demo_model_path(), limits=Limits(), environment={}, build=folder
    )
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout == "kernel\n"
    assert "Read-only" in done.stderr
    assert view.build in mounts
