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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from isologit.errors import UserError
from isologit.judge.entry import Entry, EntryError
from isologit.judge.evidence import ProcessFacts
from isologit.judge.family import (
    cpu_seconds_below,
    descendants,
    end_descendants,
    memory_bytes,
    mount_points,
    other_namespaces,
    send,
)
from isologit.judge.profile import Limits
from isologit.judge.sandbox import WRITABLE, View, inside, limit, outside, sandbox_problem, sandboxed

_FOLDER = Path(__file__).parent
OUTSIDE = {"PATH": os.environ.get("PATH", os.defpath)}  # bubblewrap's own environment can be read in the sandbox
_POLL_S = 0.05
_WATCH_S = 0.25
_LOG_BYTES = 256 << 10  # of an entry's output that is kept
_LAST_WORD_S = 5.0  # beyond what the supervisor was given
_THREADS = 2048  # beside the processes that a profile allows: the system's own limit counts both


class SandboxError(UserError):
    """The judge's own sandbox could not be made; no entry is to blame."""


@dataclass(frozen=True)
class Running:
    """A started entry: where it listens, the process below which all of it is, and one in whose network it listens
    (None: this one's)."""

    url: str
    supervisor_pid: int
    namespace_pid: int | None

    def beside(self, command: Sequence[str | Path]) -> list[str]:
        """The command, run in the entry's network."""
        words = [str(word) for word in command]
        if self.namespace_pid is None:
            return words
        return [sys.executable, "-I", "-S", str(_FOLDER / "namespaces.py"), str(self.namespace_pid), *words]


class EntryProcess:
    """One life of an entry. `facts` and `log` are complete when the `running` block has been left.

    model: the folder of weights that it may read. build: what the entry built before the round. folder: where a
    scratch may be made in practice mode, without a sandbox, for machines that have none.
    """

    def __init__(
        self, entry: Entry, model: Path, limits: Limits, folder: Path, *, practice: bool, build: Path | None = None
    ) -> None:
        self.facts = ProcessFacts(sandbox="none" if practice else "bubblewrap")
        self.log = b""
        self._entry, self._model, self._limits, self._practice = entry, model.resolve(), limits, practice
        self._folder, self._build = folder, build
        self._process: subprocess.Popen[bytes] | None = None
        self._init_pid: int | None = None  # of the sandbox; in whose namespaces the entry is
        self._supervisor: int | None = None
        self._status = _StatusPipe()
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._files_in_memory = psutil.virtual_memory().shared
        self._scratch: Path | None = None

    @contextmanager
    def running(self) -> Iterator[Running | None]:
        """Start, wait until it answers, and end it with all its processes afterwards; None when it did not start.

        Raises SandboxError when the sandbox itself fails.
        """
        self.facts.files_before = self._files()
        try:
            yield self._start()
        finally:
            self.facts.mounts = mount_points(self._family()) if self.facts.started and not self._practice else []
            self._stop()
            self.facts.files_after = self._files()
            if self._scratch is not None:
                _remove(self._scratch)

    def alive(self) -> bool:
        """Whether the entry's own process still runs."""
        return self._process is not None and self._process.poll() is None and not self._status.final()

    # -- starting -------------------------------------------------------------------------------------------------

    def _start(self) -> Running | None:
        problem = None if self._practice else sandbox_problem()
        if problem is not None:
            raise SandboxError(problem)
        port, deadline = _free_port(), time.monotonic() + self._limits.start_s
        begun = time.monotonic()
        self._launch(port, deadline)
        if not self._answers(port, deadline):
            return None
        facts = self.facts
        facts.started, facts.start_s = True, time.monotonic() - begun
        assert self._supervisor is not None
        facts.start_cpu_s = cpu_seconds_below(self._supervisor)
        return Running(f"http://127.0.0.1:{port}", self._supervisor, self._init_pid)

    def _launch(self, port: int, deadline: float) -> None:
        """Start supervisor and entry, and the threads that watch them."""
        limits = self._limits
        view = self._view()
        words = self._entry.command(
            port=port,
            model=view.model,
            scratch=view.scratch,
            entry=view.entry,
            build=view.build,
            python=sys.executable,
        )
        tasks = 0 if self._practice else limits.processes + _THREADS
        command = [sys.executable, "-I", "-S", view.supervisor, str(self._status.write_end), str(limits.stop_s),
                   str(tasks), *words]  # fmt: skip
        environment = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        read_info, write_info = os.pipe()
        if self._practice:
            command = ["env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", f"HOME={view.scratch}",
                       *(f"{name}={value}" for name, value in environment.items()), *command]  # fmt: skip
        else:
            command, self.facts.allowed_mounts = sandboxed(
                command, entry=self._entry.folder, model=self._model, limits=limits, info_fd=write_info,
                environment=environment, build=self._build,
            )  # fmt: skip
        with os.fdopen(read_info) as info:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=(self._status.write_end, write_info),
                    cwd=self._entry.folder,
                    env=OUTSIDE,
                    start_new_session=True,
                    preexec_fn=limit(limits),
                )
            finally:
                os.close(write_info)
                self._status.close_write_end()
            self._begin(self._drain)
            if self._practice:
                self._supervisor = self._process.pid
            else:
                self._init_pid = _child_pid(info.fileno(), deadline)
                self._supervisor = self._find_supervisor(deadline)
        self._begin(self._watch)

    def _find_supervisor(self, deadline: float) -> int:
        """The one process below the sandbox's first, when it says that it is ready; the entry is below it."""
        while self._init_pid is not None and not self._status.messages() and time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            time.sleep(_POLL_S / 10)
        if self._init_pid is not None and self._status.messages():
            with suppress(psutil.Error, IndexError):
                found: int = psutil.Process(self._init_pid).children()[0].pid
                return found
        time.sleep(_POLL_S)
        said = " ".join(self.log.decode(errors="replace").split())[-300:]
        raise SandboxError(f"bubblewrap did not start: {said or 'it said nothing'}")

    def _begin(self, target: Any) -> None:
        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _view(self) -> View:
        if not self._practice:
            return inside()
        self._scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=self._folder)).resolve()
        self.facts.scratch_was_empty = not any(self._scratch.iterdir())
        return outside(self._entry.folder, self._model, self._scratch, self._build)

    def _answers(self, port: int, deadline: float) -> bool:
        """Whether the health path answers with 200 before the deadline and the entry's end."""
        assert self._supervisor is not None
        running = Running(f"http://127.0.0.1:{port}", self._supervisor, self._init_pid)
        health = self._entry.spec.health
        probe = running.beside([sys.executable, "-I", "-S", _FOLDER / "probe.py", str(port), health])
        while time.monotonic() < deadline:
            if self.facts.problem is not None:
                return False
            if not self.alive():
                said = [message["problem"] for message in self._status.messages() if "problem" in message]
                self.facts.problem = said[0] if said else "ended before it answered"
                self.facts.died = True
                return False
            left = max(_POLL_S, min(5.0, deadline - time.monotonic()))
            with suppress(subprocess.TimeoutExpired):
                if subprocess.run(probe, capture_output=True, timeout=left, check=False).returncode == 0:
                    return True
            time.sleep(_POLL_S)
        self.facts.problem = f"did not answer GET {health} with status 200 within {self._limits.start_s:g} s"
        return False

    def _files(self) -> str:
        """The hash of the entry's files, or why there is none."""
        try:
            return self._entry.sha256()
        except (EntryError, OSError) as error:
            return f"cannot be read: {error}"

    # -- while it runs ----------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Read the entry's output, keep the end of it, and end an entry that writes too much."""
        assert self._process is not None
        assert self._process.stdout is not None
        most = int(self._limits.output_mib * (1 << 20))
        while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
            self.facts.output_bytes += len(chunk)
            self.log = (self.log + chunk)[-_LOG_BYTES:]
            if self.facts.output_bytes > most and not self._stopping.is_set():
                self._end(f"wrote more than {self._limits.output_mib:g} MiB of output")

    def _watch(self) -> None:
        """Memory, number of processes, and namespaces, several times a second."""
        assert self._supervisor is not None
        while not self._stopping.wait(_WATCH_S):
            family = self._family()
            if self._practice:
                self.facts.peers = sorted({*self.facts.peers, *_peers(family)})
            else:
                seen = other_namespaces(family, self._supervisor)
                self.facts.own_namespaces = sorted({*self.facts.own_namespaces, *seen})
            problem = self._over_limit(family)
            if problem is not None:
                self._end(problem)
                return

    def _over_limit(self, family: Sequence[psutil.Process]) -> str | None:
        limits = self._limits
        if len(family) > limits.processes:
            return f"had more than {limits.processes} processes"
        most = limits.memory_gib * (1 << 30)
        # NOTE: files in memory that no process maps are in nobody's share; only the system's own sum shows them.
        files = psutil.virtual_memory().shared - self._files_in_memory - len(WRITABLE) * limits.scratch_gib * (1 << 30)
        if max(files, memory_bytes(family, most)) > most:
            return f"used more than {limits.memory_gib:g} GiB of memory"
        if self._scratch is not None and folder_bytes(self._scratch) > limits.scratch_gib * (1 << 30):
            return f"kept more than {limits.scratch_gib:g} GiB in its scratch"
        return None

    def _family(self) -> list[psutil.Process]:
        """All of the entry's processes. NOTE: found by their place, for a process may give itself any name."""
        return [] if self._supervisor is None else descendants(self._supervisor)

    def _end(self, problem: str) -> None:
        """End an entry that is over a limit, at once."""
        self.facts.problem = self.facts.problem or problem
        self._kill()

    # -- ending -------------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        self._stopping.set()
        if self._process is not None:
            if self._supervisor is not None and self.alive():
                send(self._supervisor, signal.SIGTERM)
                deadline = time.monotonic() + self._limits.stop_s + _LAST_WORD_S
                while self.alive() and time.monotonic() < deadline:
                    time.sleep(_POLL_S)
            self._kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_LAST_WORD_S)
            for thread in self._threads:
                thread.join(timeout=_LAST_WORD_S)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._account()
        self._status.close()

    def _account(self) -> None:
        """What the supervisor said of the entry's end; without a word of it, the entry was not ended as it should."""
        facts = self.facts
        for message in self._status.messages():
            for name in ("exit_code", "left_processes", "peak_memory_mib"):
                if name in message:
                    setattr(facts, name, message[name])
            facts.died |= bool(message.get("died"))
            facts.killed |= bool(message.get("killed"))
            if "cpu_s" in message and facts.start_cpu_s is not None:
                facts.run_cpu_s = max(0.0, message["cpu_s"] - facts.start_cpu_s)
        if self._supervisor is not None and not self._status.final():
            facts.killed = True
            facts.problem = facts.problem or "the process above it was ended or held, so nothing is known of its end"

    def _kill(self) -> None:
        """End every process at once; in a sandbox the end of its first process is the end of all."""
        assert self._process is not None
        if self._init_pid is not None and psutil.pid_exists(self._init_pid) and self._process.poll() is None:
            send(self._init_pid, signal.SIGKILL)
        if self._practice:
            end_descendants(self._process.pid)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class _StatusPipe:
    """What the supervisor says, one JSON object a line. Nobody else holds the other end."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._waiting = b""
        self._messages: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._open = {self._read_end, self.write_end}

    def messages(self) -> list[dict[str, Any]]:
        """All that were said so far."""
        with self._lock, suppress(BlockingIOError):
            while self._read_end in self._open and (chunk := os.read(self._read_end, 1 << 16)):
                *lines, self._waiting = (self._waiting + chunk).split(b"\n")
                self._messages += [json.loads(line) for line in lines]
        return list(self._messages)

    def final(self) -> bool:
        """Whether the entry has ended, or could not be started."""
        return any("exit_code" in message or "problem" in message for message in self.messages())

    def close_write_end(self) -> None:
        """After the start: the end of the supervisor is then the end of the pipe."""
        self._close(self.write_end)

    def close(self) -> None:
        """Both ends; messages stay."""
        self._close(self.write_end)
        self._close(self._read_end)

    def _close(self, end: int) -> None:
        if end in self._open:
            self._open.remove(end)
            os.close(end)


def _peers(family: Sequence[psutil.Process]) -> set[str]:
    """Addresses that the processes are connected to, of connections that they opened themselves."""
    found: set[str] = set()
    listening: set[int] = set()
    for process in family:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        listening |= {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
        found |= {f"{c.raddr.ip}:{c.raddr.port}" for c in connections if c.raddr and c.laddr.port not in listening}
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _child_pid(info: int, deadline: float) -> int | None:
    """The process in whose namespaces the entry runs, as bubblewrap says it before it starts anything."""
    said = b""
    while select.select([info], [], [], max(0.0, deadline - time.monotonic()))[0] and (chunk := os.read(info, 4096)):
        said += chunk
    try:
        pid: int = json.loads(said)["child-pid"]
    except (ValueError, LookupError):
        return None
    return pid


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder that somebody else is writing to."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _remove(folder: Path) -> None:
    """A folder with all that an entry left in it, whatever rights it took away."""
    for parent, names, _ in os.walk(folder):
        for name in (".", *names):
            with suppress(OSError):
                if not os.path.islink(os.path.join(parent, name)):
                    os.chmod(os.path.join(parent, name), 0o700)
    shutil.rmtree(folder, ignore_errors=True)
