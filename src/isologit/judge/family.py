"""An entry's processes as the operating system lists them: found, measured, and ended. Knows no protocol."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

_NAMESPACES = ("user", "mnt", "pid", "net")
_ROUNDS = 200  # of ending what is there, while something still appears
_PAUSE_S = 0.01


def descendants(pid: int) -> list[psutil.Process]:
    """All living processes below this one; none when it is gone."""
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    return found


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """Processor time of living processes and of the children they have waited for."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def cpu_seconds_below(pid: int) -> float:
    """Processor time of everything that was ever started below a process, itself excluded.

    Whatever lost its parent and ended was waited for by this process, or is still below it.
    """
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.children_user + times.children_system) + cpu_seconds(descendants(pid))


def memory_bytes(processes: Sequence[psutil.Process], enough: float) -> int:
    """Memory in use. Pages that several processes share are counted once, which is looked up only above `enough`."""
    used = sum(_measured(process, shared_once=False) for process in processes)
    if used <= enough:
        return used
    return sum(_measured(process, shared_once=True) for process in processes)


def _measured(process: psutil.Process, *, shared_once: bool) -> int:
    try:
        used: int = process.memory_full_info().pss if shared_once else process.memory_info().rss
    except psutil.Error:
        return 0
    return used


def mount_points(processes: Iterable[psutil.Process]) -> list[str]:
    """Every mount point that one of the processes sees, but not those below /proc and /dev, which are always there."""
    points: set[str] = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/mountinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        for point, count in Counter(line.split()[4] for line in lines).items():
            points.add(point if count == 1 else f"{point}, mounted over")
    return sorted(point for point in points if not f"{point}/".startswith(("/proc/", "/dev/")))


def other_namespaces(processes: Iterable[psutil.Process], than: int) -> set[str]:
    """Kinds of namespaces (`user`, `mnt`, `pid`, `net`) in which a process is not where process `than` is."""
    return {kind for process in processes for kind in _NAMESPACES if _namespace(process.pid, kind, than)}


def _namespace(pid: int, kind: str, than: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/{than}/ns/{kind}")
    except OSError:  # it has ended meanwhile
        return False


def end_descendants(pid: int) -> None:
    """End everything below a process: frozen first, so that nothing forks, and again until nothing appears."""
    for _ in range(_ROUNDS):
        found = [process for process in descendants(pid) if _alive(process)]
        if not found:
            return
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in found:
                send(process.pid, number)
        time.sleep(_PAUSE_S)


def send(pid: int, number: int) -> None:
    """A signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
