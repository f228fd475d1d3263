"""What a process may still take: the least of all limits that there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from isologit.common.memory import FreeMemory, free_memory, peak_resident_bytes, resident_bytes


def group(system: Path, folder: str, most: object, used: int, cache: int, *, v1: bool = False) -> None:
    at = system / "sys/fs/cgroup" / folder
    at.mkdir(parents=True, exist_ok=True)
    limit, usage, stat = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if v1
        else ("memory.max", "memory.current", "inactive_file")
    )
    (at / limit).write_text(f"{most}\n")
    (at / usage).write_text(f"{used}\n")
    (at / "memory.stat").write_text(f"anon 5\n{stat} {cache}\n")


def belongs_to(system: Path, lines: str) -> None:
    (system / "proc/self").mkdir(parents=True)
    (system / "proc/self/cgroup").write_text(lines)


def test_without_control_groups_it_is_the_machine(tmp_path: Path) -> None:
    found = free_memory(system=tmp_path)
    assert found.limited_by == "the machine"
    assert found.nbytes > 0


def test_a_group_of_version_2_and_those_above_it(tmp_path: Path) -> None:
    belongs_to(tmp_path, "0::/outer/inner\n")
    group(tmp_path, "outer/inner", "max", 7, 0)
    group(tmp_path, "outer", 1000, 700, 50)
    assert free_memory(system=tmp_path) == FreeMemory(350, "the control group")
    group(tmp_path, "outer/inner", 500, 300, 10)
    assert free_memory(system=tmp_path).nbytes == 210


def test_a_group_of_version_1(tmp_path: Path) -> None:
    belongs_to(tmp_path, "9:name=systemd:/x\n4:memory:/own\n0::/\n")
    group(tmp_path, "memory/own", 900, 400, 100, v1=True)
    group(tmp_path, "memory", 2**63 - 4096, 10**9, 0, v1=True)
    assert free_memory(system=tmp_path).nbytes == 600


def test_in_a_container_the_mounted_root_counts(tmp_path: Path) -> None:
    belongs_to(tmp_path, "0::/a/path/of/the/host\n")
    group(tmp_path, ".", 800, 900, 0)
    assert free_memory(system=tmp_path).nbytes == 0


def test_ulimit_counts() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from isologit.common.memory import free_memory; found = free_memory()\n"
        "assert found.limited_by == 'ulimit -v', found\n"
        "assert 0 < found.nbytes < 1 << 30, found\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("measure", [resident_bytes, peak_resident_bytes])
def test_this_process_holds_something(measure: object) -> None:
    assert 1 << 20 < measure() < 1 << 40  # type: ignore[operator]
