"""How much memory this process may still take: the machine's, its control groups' and its own limit, whichever ends
first. Knows nothing of what it is for.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that this process may still take, and who says so, in words."""

    nbytes: int
    limited_by: str


def free_memory(*, system: Path = Path("/")) -> FreeMemory:
    """The least of what the machine has, what each control group above this process allows, and `ulimit -v`.

    Of a control group's memory the file cache counts as free where the system may take it back. system: where /proc and
    /sys are.
    """
    limits = [FreeMemory(int(psutil.virtual_memory().available), "the machine")]
    limits += [FreeMemory(nbytes, "the control group") for nbytes in _control_groups(system)]
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        limits.append(FreeMemory(max(0, most - psutil.Process().memory_info().vms), "ulimit -v"))
    return min(limits, key=lambda limit: limit.nbytes)


def resident_bytes() -> int:
    """What this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _control_groups(system: Path) -> Iterator[int]:
    """Free bytes of every control group with a limit, from this process's own up to the root; versions 1 and 2."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = system / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = system / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # NOTE: in a container the path may be the host's, and then only the root of what is mounted is there.
        own = root / path.lstrip("/")
        for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(root))):
            free = _free_of_group(folder, *names)
            if free is not None:
                yield free


def _free_of_group(folder: Path, most: str, used: str, cache: str) -> int | None:
    """None without a limit."""
    try:
        limit, usage = int((folder / most).read_text()), int((folder / used).read_text())
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # NOTE: "max" is no limit
        return None
    return max(0, limit - usage + int(facts.get(cache, 0)))
