"""What an entry may see and use: a bubblewrap command, or in practice mode only limits and a process group.

Owns mounts and limits; starts nothing.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import isologit
from isologit.judge.profile import Limits

ENTRY, MODEL, SCRATCH, BUILD, SUPERVISOR = "/entry", "/model", "/scratch", "/build", "/judge/supervisor.py"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": SCRATCH, "TMPDIR": "/tmp"}
WRITABLE = ("/tmp", SCRATCH, "/dev/shm")
_OPEN_FILES = 65536


@dataclass(frozen=True)
class View:
    """Where an entry's process finds what it needs; host paths in practice mode."""

    entry: str
    model: str
    scratch: str
    build: str
    supervisor: str


@cache
def sandbox_problem() -> str | None:
    """Why bubblewrap cannot be used here, or None."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (Debian and Ubuntu: the package bubblewrap)"
    probe = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--dev", "/dev", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"bubblewrap cannot make namespaces here: {' '.join(done.stderr.split())}"


def sandboxed(
    command: list[str],
    *,
    entry: Path,
    model: Path,
    limits: Limits,
    environment: dict[str, str],
    build: Path | None = None,
    building: bool = False,
    info_fd: int | None = None,
) -> tuple[list[str], list[str]]:
    """The command inside bubblewrap, and the mount points that it may see.

    Read-only: system, Python's runtime, entry, weights. Writable: a scratch, /tmp and /dev/shm in memory, each with a
    limit. No network but its own loopback, no capabilities, no other process, an environment that is made here.
    build: what the entry built, read-only but while it is `building`. info_fd: where bubblewrap says which process is
    the sandbox's first.
    """
    scratch_bytes = int(limits.scratch_gib * (1 << 30))
    binds = [(path, path) for path in _runtime()]
    binds += [(str(entry), ENTRY), (str(model), MODEL), (str(_supervisor_file()), SUPERVISOR)]
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    words += [] if info_fd is None else ["--info-fd", str(info_fd)]
    words += ["--proc", "/proc", "--dev", "/dev"]
    for place in WRITABLE:
        words += ["--size", str(scratch_bytes), "--tmpfs", place]
    for source, target in binds:
        words += ["--ro-bind", source, target]
    if build is not None:
        words += ["--bind" if building else "--ro-bind", str(build), BUILD]
    for place in ("/", "/dev"):  # NOTE: both are memory without a limit
        words += ["--remount-ro", place]
    for name, value in {**_ENVIRONMENT, **environment}.items():
        words += ["--setenv", name, value]
    words += ["--chdir", ENTRY, "--", *command]
    return words, sorted({"/", "/tmp", SCRATCH, *([BUILD] if build else []), *(target for _, target in binds)})


def limit(limits: Limits) -> Callable[[], None]:
    """What a new process does before it becomes the entry: cores, memory, files, no core dumps; niceness stays."""

    def apply() -> None:
        if limits.cores is not None:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: limits.cores])
        memory = int(limits.memory_gib * (1 << 30))
        resource.setrlimit(resource.RLIMIT_AS, (4 * memory, 4 * memory))  # NOTE: runtimes reserve more than they use
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(hard, _OPEN_FILES) if hard != resource.RLIM_INFINITY else _OPEN_FILES
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), most))

    return apply


def inside() -> View:
    """Paths in the sandbox."""
    return View(ENTRY, MODEL, SCRATCH, BUILD, SUPERVISOR)


def outside(entry: Path, model: Path, scratch: Path, build: Path | None) -> View:
    """Paths without one."""
    return View(str(entry), str(model), str(scratch), "" if build is None else str(build), str(_supervisor_file()))


def _supervisor_file() -> Path:
    return Path(__file__).with_name("supervisor.py")


def _runtime() -> list[str]:
    """The system's programs and libraries, Python's own, and this package, which entries may use as well."""
    python = {sys.prefix, sys.base_prefix, str(Path(isologit.__file__).resolve().parent.parent)}
    found = [path for path in _SYSTEM if Path(path).exists()]
    return found + sorted(path for path in python if not any(path.startswith(f"{known}/") for known in found))
