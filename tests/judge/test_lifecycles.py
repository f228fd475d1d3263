"""Whatever an entry does with its life: bounded time, a reason that says what it was, and nothing of it afterwards."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from isologit.judge.audits import AUDITS, Case
from isologit.judge.entry import Entry
from isologit.judge.evidence import RunEvidence
from isologit.judge.profile import Limits, Load, Profile
from isologit.judge.prompts import RoundPrompts
from isologit.judge.run import RunSpec, perform_run
from isologit.judge.sandbox import sandbox_problem
from isologit.judge.seeds import RoundSeed
from isologit.workload import demo_model_path

HOSTILE = Path(__file__).parent / "hostile"
SEED = RoundSeed(bytes(32))
PROMPTS = RoundPrompts([(f"r{i}", "Hello", 4) for i in range(3)], [], [("w", "Warm", 4)])
LIMITS = Limits(
    start_s=10,
    request_s=6,
    run_s=8,
    stop_s=0.5,
    silence_s=2.5,
    memory_gib=0.25,
    scratch_gib=0.02,
    output_mib=1,
    processes=8,
    cores=1,
)
BOUND_S = 45.0  # of a run on a busy machine; the limits above add up to less


class Life:
    """Runs a hostile entry once and knows what it left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = ""

    def run(self, mode: str, *, practice: bool = False, **limits: float) -> RunEvidence:
        token = f"life-{os.getpid()}-{time.monotonic_ns()}"
        entry = self.entry(mode, token)
        profile = Profile(
            name="t", title="t", load=Load(warm_up=1), limits=LIMITS.model_copy(update=limits), reveal_rows=1
        )
        work = self.folder / "work"
        work.mkdir()
        before = surroundings()
        begun = time.monotonic()
        spec = RunSpec("round", "run", "timed", 0, 1, entry.sha256())
        evidence, log = perform_run(spec, entry, profile, PROMPTS, demo_model_path(), SEED, work, practice=practice)
        assert time.monotonic() - begun < BOUND_S
        self.log = log.decode(errors="replace")
        assert processes_with(token) == []
        assert surroundings() == before
        assert list(work.iterdir()) == []
        evidence.write(work)
        assert RunEvidence.read(work) == evidence
        return evidence

    def entry(self, mode: str, token: str) -> Entry:
        target = self.folder / "entry"
        shutil.copytree(HOSTILE, target)
        file = target / "entry.yaml"
        file.write_text(file.read_text().replace("MODE", mode).replace("TOKEN", token))
        return Entry(target)


def processes_with(word: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if word in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(str(process))
        except psutil.Error:
            continue
    return found


def surroundings() -> dict[str, object]:
    """What a run could leave in and around the judge."""
    gc.collect()  # what other tests left
    return {
        "children": [child.pid for child in psutil.Process().children(recursive=True)],
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "sockets": len(psutil.Process().net_connections()),
        "temporary": sorted(os.listdir(tempfile.gettempdir())),
    }


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Life:
    if (problem := sandbox_problem()) is not None:
        pytest.skip(problem)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return Life(tmp_path)


def reasons(evidence: RunEvidence) -> str:
    """What conservation says of it: the sentence that the board shows."""
    case = Case(Profile(name="t", title="t"), Entry(HOSTILE).spec, [evidence], None)  # type: ignore[arg-type]
    return " ".join(finding.message for finding in AUDITS["conservation"].verify(case))


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("exits", "ended before it answered"),
        ("hangs", "did not answer GET /health with status 200 within 2 s"),
        ("is not ready", "did not answer GET /health with status 200 within 2 s"),
        ("forks without end", "more than 8 processes"),
        ("hides by its name", "more than 8 processes"),
        ("holds memory", "more than 0.25 GiB of memory"),
        ("holds files in memory", "more than 0.25 GiB of memory"),
        ("floods its output", "more than 1 MiB of output"),
    ],
)
def test_lives_that_do_not_get_past_the_start(life: Life, mode: str, said: str) -> None:
    late = mode in ("hangs", "is not ready")
    evidence = life.run(mode, **({"start_s": 2.0} if late else {}))
    assert not evidence.process.started
    assert said in reasons(evidence)
    assert said in str(evidence.process.problem)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("sends nothing to the warm-up", "nonce and warm-up took longer than 4 s"),
        ("dies", "ended during the run"),
        ("ends its supervisor", "nothing is known of its end"),
        ("floods its output later", "more than 1 MiB of output"),
        ("holds memory later", "more than 0.25 GiB of memory"),
        ("fails", "status 500"),
        ("sends elsewhere", "status 307"),
        ("is no server", "3 of 3 requests failed"),
        ("answers garbage", "not JSON"),
        ("sends a huge header", "3 of 3 requests failed"),
        ("sends headers without end", "3 of 3 requests failed"),
        ("sends a bomb", "3 of 3 requests failed"),
        ("sends tokens without end", "does not end"),
        ("sends a line without end", "more than"),
        ("sends a byte a second", "no token of any request came for 2.5 s"),
        ("sends comments", "no token of any request came for 2.5 s"),
        ("sends nothing", "no token of any request came for 2.5 s"),
        ("closes in the middle", "without the dialect's last message"),
        ("nests deeply", "nested too deeply"),
        ("sends a strange id", "not a number of tokens or a token id"),
        ("sends a strange number", "not a number: 'nan'"),
        ("holds its supervisor", "nothing is known of its end"),
    ],
)
def test_lives_that_go_wrong_under_load(life: Life, mode: str, said: str) -> None:
    evidence = life.run(mode, **({"start_s": 4.0} if mode == "sends nothing to the warm-up" else {}))
    assert evidence.process.started
    assert said in reasons(evidence), (reasons(evidence), evidence)


def test_a_good_life_has_no_reason_against_it(life: Life) -> None:
    evidence = life.run("none")
    assert reasons(evidence) == ""
    assert not evidence.process.killed
    assert evidence.process.run_cpu_s is not None


def test_half_a_character_is_kept_as_it_came(life: Life) -> None:
    assert life.run("sends half a character").records[0].text == "\ud800"


@pytest.mark.parametrize("practice", [False, True])
def test_who_ignores_sigterm_is_ended_and_it_is_said(life: Life, practice: bool) -> None:
    evidence = life.run("ignores SIGTERM", practice=practice, memory_gib=1.0)
    assert evidence.process.killed
    assert evidence.process.exit_code == -9
    assert reasons(evidence) == ""


@pytest.mark.parametrize("practice", [False, True])
def test_a_daemon_is_counted_and_ended(life: Life, practice: bool) -> None:
    evidence = life.run("leaves a daemon", practice=practice, memory_gib=1.0)
    assert evidence.process.left_processes == 1


@pytest.mark.parametrize("mode", ["forks without end", "floods its output", "keeps files"])
def test_limits_hold_without_a_sandbox(life: Life, mode: str) -> None:
    assert "more than" in reasons(life.run(mode, practice=True, memory_gib=4.0))


def test_memory_behind_every_folder_is_limited(life: Life) -> None:
    evidence = life.run("fills what it can", memory_gib=1.0)
    assert reasons(evidence) == ""
    lines = life.log.splitlines()
    assert [line for line in lines if "No space left" in line] == [
        f"{place}: No space left on device after {n} MiB"
        for place, n in (("/scratch", 20), ("/tmp", 20), ("/dev/shm", 20))
    ]
    assert [line for line in lines if "Read-only" in line] == [
        "/dev: Read-only file system after 0 MiB",
        "/: Read-only file system after 0 MiB",
    ]


def test_a_scratch_without_rights_is_removed(life: Life) -> None:
    evidence = life.run("takes rights away", practice=True, memory_gib=1.0)
    assert reasons(evidence) == ""


def test_what_an_entry_sees_from_inside(life: Life) -> None:
    life.run("looks around")
    seen = json.loads(life.log.splitlines()[0])
    assert seen["capabilities"] == "0" * 16
    assert len(seen["processes"]) == 3  # the sandbox's first, the supervisor, itself
    assert seen["environment"] == [
        "HOME",
        "LANG",
        "PATH",
        "PWD",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONUNBUFFERED",
        "TMPDIR",
    ]
    assert set(seen["descriptors"]) <= {"0", "1", "2", "3"}  # the last is the folder that lists them
    assert seen["cores"] == 1
    assert "parent" not in seen
    for place in ("/", "/dev", "/entry", "/model", "/usr", "/judge"):
        assert seen[f"write {place}"] == "Read-only file system", place
