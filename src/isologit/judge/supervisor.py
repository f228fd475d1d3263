"""Runs inside the sandbox as the parent of an entry: starts it, ends it, and counts what it leaves behind.

Stands alone, so that it can be mounted into a sandbox as one file. Speaks to the judge by JSON lines on a pipe that the
entry does not inherit.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time

_PR_SET_CHILD_SUBREAPER = 36
_SETTLE_S = 1.0


def main() -> None:
    """`supervisor.py STATUS_FD STOP_SECONDS COMMAND...`"""
    status, stop_s, command = os.fdopen(int(sys.argv[1]), "w", buffering=1), float(sys.argv[2]), sys.argv[3:]
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        entry = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=True)
    except OSError as error:
        print(json.dumps({"problem": f"cannot start {command[0]}: {error.strerror}"}), file=status)
        return
    print(json.dumps({"pid": entry.pid}), file=status)
    while entry.poll() is None and not asked:
        time.sleep(0.02)
    died, killed = not asked, False
    if asked and entry.poll() is None:
        entry.terminate()
        deadline = time.monotonic() + stop_s
        while entry.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if entry.poll() is None:
            killed = True
            entry.kill()
            entry.wait()
    settled = time.monotonic() + _SETTLE_S
    while (left := _children()) and time.monotonic() < settled:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    _reap()
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


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
