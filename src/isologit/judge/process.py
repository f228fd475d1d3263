"""An entry as a process: started in its sandbox, watched while it runs, ended in bounded time whatever it does."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from isologit.judge.entry import Entry
from isologit.judge.evidence import ProcessFacts
from isologit.judge.profile import Limits
from isologit.judge.sandbox import View, inside, limit, outside, sandbox_problem, sandboxed

_FOLDER = Path(__file__).parent
_POLL_S = 0.05
_WATCH_S = 0.25
_LOG_BYTES = 256 << 10  # of an entry's output that is kept
_LAST_WORD_S = 5.0  # beyond what the supervisor was given


@dataclass(frozen=True)
class Running:
    """A started entry: where it listens, and a process in whose network it does (None: this one's)."""

    url: str
    namespace_pid: int | None

    def beside(self, command: Sequence[str | Path]) -> list[str]:
        """The command, run in the entry's network."""
        words = [str(word) for word in command]
        if self.namespace_pid is None:
            return words
        return [sys.executable, "-I", "-S", str(_FOLDER / "namespaces.py"), str(self.namespace_pid), *words]


class EntryProcess:
    """One life of an entry. `facts` and `log` are complete when the `running` block has been left.

    model: the folder of weights that it may read. practice: without a sandbox, for machines that have none.
    """

    def __init__(self, entry: Entry, model: Path, limits: Limits, *, practice: bool) -> None:
        self.facts = ProcessFacts(sandbox="none" if practice else "bubblewrap")
        self.log = b""
        self._entry, self._model, self._limits, self._practice = entry, model.resolve(), limits, practice
        self._process: subprocess.Popen[bytes] | None = None
        self._status: IO[str] | None = None
        self._messages: list[dict[str, Any]] = []
        self._init_pid: int | None = None
        self._stopping = threading.Event()
        self._scratch: Path | None = None

    @contextmanager
    def running(self) -> Iterator[Running | None]:
        """Start, wait until it answers, and end it with all its processes afterwards; None when it did not start."""
        self.facts.files_before = self._entry.sha256()
        watcher: threading.Thread | None = None
        try:
            started = self._start()
            if started is not None:
                watcher = threading.Thread(target=self._watch, daemon=True)
                watcher.start()
            yield started
        finally:
            self.facts.mounts = self._mounts() if self.facts.started else []
            self._stop()
            if watcher is not None:
                watcher.join()
            self.facts.files_after = self._entry.sha256()
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)

    def cpu_seconds(self) -> float:
        """Processor time of all living processes of the entry and of the children they have waited for."""
        total = 0.0
        for process in self._family():
            try:
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
            except psutil.Error:
                continue
        return total

    def alive(self) -> bool:
        """Whether the entry's own process still runs."""
        return self._process is not None and self._process.poll() is None and not self._final()

    # -- starting -------------------------------------------------------------------------------------------------

    def _start(self) -> Running | None:
        limits, facts = self._limits, self.facts
        problem = None if self._practice else sandbox_problem()
        if problem is not None:
            facts.problem = problem
            return None
        port = _free_port()
        read_status, write_status = os.pipe()
        read_info, write_info = os.pipe()
        view = self._view()
        words = self._entry.command(
            port=port, model=view.model, scratch=view.scratch, entry=view.entry, python=sys.executable
        )
        command = [sys.executable, "-I", "-S", view.supervisor, str(write_status), str(limits.stop_s), *words]
        environment = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        if self._practice:
            command = ["env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", f"HOME={view.scratch}",
                       *(f"{name}={value}" for name, value in environment.items()), *command]  # fmt: skip
        else:
            command, facts.allowed_mounts = sandboxed(
                command, entry=self._entry.folder, model=self._model, limits=limits, info_fd=write_info,
                environment=environment,
            )  # fmt: skip
        begun = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write_status, write_info),
            cwd=self._entry.folder,
            start_new_session=True,
            preexec_fn=limit(limits),
        )
        os.close(write_status)
        os.close(write_info)
        self._status = os.fdopen(read_status)
        os.set_blocking(read_status, False)
        threading.Thread(target=self._drain, daemon=True).start()
        if self._practice:
            os.close(read_info)
        else:
            self._init_pid = _read_info(read_info, begun + limits.start_s)
        if not self._answers(port, begun + limits.start_s):
            if facts.problem is None:
                facts.problem = f"did not answer GET {self._entry.spec.health} within {limits.start_s:g} s"
            return None
        facts.started, facts.start_s, facts.start_cpu_s = True, time.monotonic() - begun, self.cpu_seconds()
        return Running(f"http://127.0.0.1:{port}", self._init_pid)

    def _view(self) -> View:
        if not self._practice:
            return inside()
        self._scratch = Path(tempfile.mkdtemp(prefix="isologit-scratch-"))
        self.facts.scratch_was_empty = not any(self._scratch.iterdir())
        return outside(self._entry.folder, self._model, self._scratch)

    def _answers(self, port: int, deadline: float) -> bool:
        """Whether the health path answers with 200 before the deadline and the entry's end."""
        running = Running(f"http://127.0.0.1:{port}", self._init_pid)
        probe = running.beside([sys.executable, "-I", "-S", _FOLDER / "probe.py", str(port), self._entry.spec.health])
        while time.monotonic() < deadline:
            if not self.alive():
                said = self._messages[-1].get("problem") if self._messages else None
                self.facts.problem = said or "ended before it answered"
                self.facts.died = True
                return False
            try:
                done = subprocess.run(probe, capture_output=True, timeout=5, check=False)
                if done.returncode == 0:
                    return True
            except subprocess.TimeoutExpired:
                pass
            if self.facts.problem is not None:
                return False
            time.sleep(_POLL_S)
        return False

    def _mounts(self) -> list[str]:
        """Mount points that any of the entry's processes sees, without those below the ones that are always there."""
        if self._practice:
            return []
        points: set[str] = set()
        for process in self._family():
            try:
                lines = Path(f"/proc/{process.pid}/mountinfo").read_text(encoding="utf-8").splitlines()
            except OSError:
                continue
            for point, count in Counter(line.split()[4] for line in lines).items():
                points.add(point if count == 1 else f"{point}, mounted over")
        always = ("/proc", "/dev")
        return sorted(point for point in points if point not in always and not point.startswith(("/proc/", "/dev/")))

    # -- while it runs ----------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Read the entry's output, keep the end of it, and end an entry that writes too much."""
        assert self._process is not None
        assert self._process.stdout is not None
        most = int(self._limits.output_mib * (1 << 20))
        while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
            self.facts.output_bytes += len(chunk)
            self.log = (self.log + chunk)[-_LOG_BYTES:]
            if self.facts.output_bytes > most and self.facts.problem is None:
                self.facts.problem = f"wrote more than {self._limits.output_mib:g} MiB of output"
                self._kill()

    def _watch(self) -> None:
        """Memory and number of processes, several times a second."""
        most_bytes = self._limits.memory_gib * (1 << 30)
        while not self._stopping.wait(_WATCH_S):
            used, count = 0, 0
            for process in self._family():
                try:
                    used += process.memory_info().rss
                    count += 1
                except psutil.Error:
                    continue
            if used > most_bytes:
                self.facts.problem = f"used more than {self._limits.memory_gib:g} GiB of memory"
            elif count > self._limits.processes:
                self.facts.problem = f"had more than {self._limits.processes} processes"
            else:
                continue
            self._kill()
            return

    def _family(self) -> list[psutil.Process]:
        """All processes below the one that was started, but not our own supervisor."""
        if self._process is None:
            return []
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            return []
        return [process for process in family if not _is_supervisor(process)]

    # -- ending -------------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        self._stopping.set()
        if self._process is None:
            return
        self._read_status()
        if not self._final():
            for process in [psutil.Process(self._process.pid), *self._everyone()]:
                if _is_supervisor(process):
                    _signal(process, signal.SIGTERM)
            deadline = time.monotonic() + self._limits.stop_s + _LAST_WORD_S
            while not self._final() and time.monotonic() < deadline and self._process.poll() is None:
                time.sleep(_POLL_S)
                self._read_status()
        self._read_status()
        self._kill()
        self._process.wait()
        for message in self._messages:
            for name in ("exit_code", "left_processes", "peak_memory_mib"):
                if name in message:
                    setattr(self.facts, name, message[name])
            self.facts.died |= bool(message.get("died"))
            self.facts.killed |= bool(message.get("killed"))
            if "cpu_s" in message and self.facts.start_cpu_s is not None:
                self.facts.run_cpu_s = max(0.0, message["cpu_s"] - self.facts.start_cpu_s)
        if not self._final():
            self.facts.killed = True
        if self._status is not None:
            self._status.close()

    def _everyone(self) -> list[psutil.Process]:
        assert self._process is not None
        try:
            found: list[psutil.Process] = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            return []
        return found

    def _kill(self) -> None:
        """End every process at once; in a sandbox the end of its first process is the end of all."""
        assert self._process is not None
        for process in self._everyone():
            _signal(process, signal.SIGKILL)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _read_status(self) -> None:
        assert self._status is not None
        while select.select([self._status], [], [], 0)[0]:
            line = self._status.readline()
            if not line:
                return
            self._messages.append(json.loads(line))

    def _final(self) -> bool:
        self._read_status()
        return any("exit_code" in message or "problem" in message for message in self._messages)


def _is_supervisor(process: psutil.Process) -> bool:
    try:
        return any(word.endswith("supervisor.py") for word in process.cmdline()[:5])
    except psutil.Error:
        return False


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _read_info(descriptor: int, deadline: float) -> int | None:
    """The process in whose namespaces the entry runs, as bubblewrap says it."""
    with os.fdopen(descriptor) as info:
        if not select.select([info], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        try:
            pid: int = json.loads(info.read())["child-pid"]
        except (ValueError, LookupError):
            return None
        return pid
