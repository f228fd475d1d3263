"""What an entry compiles: its `build` command runs once in the sandbox and makes a folder that every run may read."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from isologit.judge.entry import Entry, EntryError
from isologit.judge.process import OUTSIDE, folder_bytes
from isologit.judge.profile import Limits
from isologit.judge.sandbox import inside, limit, outside, sandboxed

_SHOWN = 300  # bytes of what a build said last
_POLL_S = 0.2


def build_entry(entry: Entry, model: Path, limits: Limits, target: Path, *, practice: bool) -> Path | None:
    """The folder that the entry built, made where it is not there yet; None for an entry that builds nothing.

    Raises EntryError when the build fails or is over a limit of time, size or output; nothing is left of it then.
    """
    if not entry.spec.build or target.is_dir():
        return target if entry.spec.build else None
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _run(entry, model.resolve(), limits, partial, Path(scratch), practice=practice)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _run(entry: Entry, model: Path, limits: Limits, build: Path, scratch: Path, *, practice: bool) -> None:
    view = outside(entry.folder, model, scratch, build) if practice else inside()
    command = entry.build_command(
        model=view.model, scratch=view.scratch, entry=view.entry, build=view.build, python=sys.executable
    )
    environment = {**OUTSIDE, "HOME": view.scratch}
    if not practice:
        command, _ = sandboxed(
            command, entry=entry.folder, model=model, limits=limits, environment={}, build=build, building=True
        )
    with (scratch.parent / f"{scratch.name}.log").open("w+b") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=entry.folder,
            env=environment,
            start_new_session=True,
            preexec_fn=limit(limits),
        )
        try:
            problem = _watch(process, limits, build, log.fileno())
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            Path(log.name).unlink()
        log.seek(-min(_SHOWN, log.seek(0, os.SEEK_END)), os.SEEK_END)
        last = " ".join(log.read().decode(errors="replace").split())
    if problem is None and process.returncode:
        problem = f"failed with exit code {process.returncode}: {last}"
    if problem is not None:
        raise EntryError(f"{entry.name}: its build {problem}")


def _watch(process: subprocess.Popen[bytes], limits: Limits, build: Path, log: int) -> str | None:
    """Wait for the end; why it must end before, or None."""
    deadline = time.monotonic() + limits.build_s
    while True:
        ended = process.poll() is not None
        if folder_bytes(build) > limits.scratch_gib * (1 << 30):
            return f"made more than {limits.scratch_gib:g} GiB"
        if os.fstat(log).st_size > limits.output_mib * (1 << 20):
            return f"wrote more than {limits.output_mib:g} MiB of output"
        if ended:
            return None
        if time.monotonic() > deadline:
            return f"took longer than {limits.build_s:g} s"
        time.sleep(_POLL_S)
