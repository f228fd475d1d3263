"""Runs inside the sandbox as the parent of an entry: starts it, ends it, and counts what it leaves behind.

Stands alone, so that it can be mounted into a sandbox as one file. Speaks to the judge by JSON lines on a pipe that the
entry does not inherit, and cannot reach either: this process lets nobody of its own user look into it.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_SETTLE_S = 1.0
_PAUSE_S = 0.02
_KILL_ROUNDS = 200


def main() -> None:
    """`supervisor.py STATUS_FD STOP_SECONDS TASKS COMMAND...`; TASKS: processes and threads that the entry may have."""
    status, stop_s, tasks = os.fdopen(int(sys.argv[1]), "w", buffering=1), float(sys.argv[2]), int(sys.argv[3])
    command = sys.argv[4:]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # no ptrace, no /proc/PID/fd
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # a judge that is killed takes its entries with it
    print(json.dumps({"ready": True}), file=status)  # fails when the judge is gone already

    def limit_tasks() -> None:
        most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        fewer = tasks if most == resource.RLIM_INFINITY else min(tasks, most)
        resource.setrlimit(resource.RLIMIT_NPROC, (fewer, fewer))

    try:
        entry = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, close_fds=True, preexec_fn=limit_tasks if tasks else None
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "strerror", None) or str(error)
        print(json.dumps({"problem": f"cannot start {command[0]}: {said}"}), file=status)
        return
    while entry.poll() is None and not asked:
        time.sleep(_PAUSE_S)
    died, killed = not asked, False
    if asked and entry.poll() is None:
        entry.terminate()
        deadline = time.monotonic() + stop_s
        while entry.poll() is None and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        if entry.poll() is None:
            killed = True
            entry.kill()
            entry.wait()
    settled = time.monotonic() + _SETTLE_S
    while (left := _children()) and time.monotonic() < settled:
        time.sleep(_PAUSE_S)
    _end_all()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        json.dumps(
            {
                "exit_code": entry.returncode,
                "died": died,
                "killed": killed,
                "left_processes": len(left),
                "cpu_s": used.ru_utime + used.ru_stime,
                "peak_memory_mib": used.ru_maxrss / 1024,
            }
        ),
        file=status,
    )


def _children() -> list[int]:
    """Living descendants: whoever loses its parent becomes ours. Zombies are reaped first."""
    _reap()
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
    found, frontier = [], {os.getpid()}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found += sorted(frontier)
    return found


def _end_all() -> None:
    """Freeze, then kill, until nothing new appears."""
    for _ in range(_KILL_ROUNDS):
        left = _children()
        if not left:
            return
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in left:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
        time.sleep(_PAUSE_S)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
