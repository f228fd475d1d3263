"""A server as a process of its own: start it, wait until it serves, read what it says, stop it and all its workers.

Knows no protocol: a server is any command that listens at an address.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from isologit.errors import UserError

_POLL_S = 0.05
_URL = re.compile(r"https?://(?:[\w.-]+|\[[0-9a-f:]+\]):\d+")


class ServerStartError(UserError):
    """The command cannot be started, ended, or does not listen in time."""


class ServerProcess:
    """A server that serves at `url`, in a process group of its own; what it writes goes to a file."""

    def __init__(
        self, command: Sequence[str], popen: subprocess.Popen[bytes], log: Path, log_start: int, *, log_is_kept: bool
    ) -> None:
        self.url = ""
        self.pid = popen.pid
        self._command = command
        self._popen = popen
        self._log = log
        self._log_is_kept = log_is_kept
        self._log_start = log_start  # bytes that were in the file before
        self._kept_output: str | None = None

    @property
    def output(self) -> str:
        """Everything written to standard output and standard error so far; all of it once the server has ended."""
        if self._kept_output is not None:
            return self._kept_output
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the server alone, not to its workers."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = 30.0) -> int:
        """The exit code, negative for a signal, once it has ended. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while (code := self._exit_code()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._name}: still runs after {seconds:g} s")
            time.sleep(_POLL_S)
        return code

    def stop(self, patience_s: float) -> None:
        """Ask politely, and after at most `patience_s` seconds kill what is left, workers too."""
        self._signal_group(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            self.wait(patience_s)
        self._signal_group(signal.SIGKILL)
        self._popen.wait()
        self._kept_output = self.output  # NOTE: a temporary log goes with the block

    def wait_until_it_serves(self, url: str | None, start_s: float) -> None:
        """Until it listens at `url`, or, where that is None, until it has written where it listens.

        Raises ServerStartError when it ends before, or takes longer than `start_s` seconds.
        """
        deadline = time.monotonic() + start_s
        while True:
            code = self._exit_code()
            if found := self._serves_at(url):
                self.url = found
                return
            if code is not None:
                raise ServerStartError(f"{self._name}: ended with exit code {code} before it served; {self._said}")
            if time.monotonic() > deadline:
                raise ServerStartError(f"{self._name}: nobody listens {start_s:g} s after it began; {self._said}")
            time.sleep(_POLL_S)

    def _serves_at(self, url: str | None) -> str | None:
        if url is not None:
            return url if listens(url) else None
        whole_lines, _, _ = self.output.rpartition("\n")
        found = _URL.search(whole_lines)
        return found[0] if found else None

    @property
    def _name(self) -> str:
        return shlex.join(self._command)

    @property
    def _said(self) -> str:
        lines = self.output.strip().splitlines()
        where = f" ({self._log})" if self._log_is_kept else ""
        return f'its last line was "{lines[-1].strip()}"{where}' if lines else "it wrote nothing"

    def _exit_code(self) -> int | None:
        """None while it runs. NOTE: it is not reaped before `stop`, so that the number of its group stays its own."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@contextlib.contextmanager
def server_process(
    command: Sequence[str],
    *,
    url: str | None = None,
    log: Path | None = None,
    start_s: float = 600.0,
    stop_s: float = 30.0,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """The server of a command while the block runs.

    url: where it will listen; None for a command that writes a line with its address once it serves. log: file to which
    its output is added; a temporary one when None. start_s: how long it may take to serve. stop_s: how long it may take
    to leave when asked, before it is killed. environment: variables; those of this process when None.

    Raises ServerStartError when it does not come up, or another server listens at `url` already.
    """
    if url is not None and listens(url):
        raise ServerStartError(f"{url}: another server listens there already; stop it, or choose another port")
    with contextlib.ExitStack() as stack:
        log_is_kept = log is not None
        if log is None:
            log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isologit-server-")), "server.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            log_start = output.tell()
            try:
                popen = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=cwd,
                    env=environment,
                    start_new_session=True,
                )
            except (OSError, ValueError, IndexError) as error:
                raise ServerStartError(f"{shlex.join(command)}: cannot be started: {error}") from None
            server = ServerProcess(command, popen, log, log_start, log_is_kept=log_is_kept)
        try:
            server.wait_until_it_serves(url, start_s)
            yield server
        finally:
            server.stop(stop_s)


def listens(url: str) -> bool:
    """Whether anybody accepts connections at the address of a URL."""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname, parts.port or 80), timeout=1.0):
            return True
    except OSError:
        return False
