"""The same requests at several rates, against one server or against one that is started anew for each rate."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from isologit.bench.load import ServerError
from isologit.bench.options import ServingOptions
from isologit.bench.serving import Measurement, measure_server
from isologit.errors import ConfigError
from isologit.job.progress import Observer, Silent

SERVER_LOG = "server.log"
_POLL_S = 0.1
_STOP_S = 30.0


def run_sweep(
    options: ServingOptions,
    request_rates: Sequence[float],
    *,
    server_command: str | None = None,
    server_start_s: float = 600.0,
    log_folder: Path = Path("."),
    observer: Observer | None = None,
) -> Iterator[Measurement]:
    """Yield a detailed measurement for every rate, in the order given; it ends early when the one server is gone.

    server_command: starts the server for each rate, so that no cache outlives one; its output goes to `server.log` in
    `log_folder`. server_start_s: how long it may take to listen. Raises ConfigError for bad rates, ServerError when a
    server does not come up, and what `measure_server` raises.
    """
    if not request_rates:
        raise ConfigError("--request-rates is empty; give numbers with commas between them, such as 5,10,inf")
    observer = observer or Silent()
    each = [replace(options, request_rate=rate) for rate in request_rates]
    for one in each:
        with contextlib.ExitStack() as stack:
            if server_command is not None:
                observer.stage("start the server")
                log = log_folder / SERVER_LOG
                stack.enter_context(_running_server(server_command, one.server_url, server_start_s, log))
            measurement = measure_server(one, detailed=True, observer=observer)
        yield measurement
        if measurement.run.server_gone and server_command is None:
            return


@contextlib.contextmanager
def _running_server(command: str, url: str, start_s: float, log: Path) -> Iterator[None]:
    """The server of a command while the block runs, in a process group of its own."""
    if _listens(url):
        raise ServerError(f"{url}: another server listens there already; stop it, or choose another --port")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(shlex.split(command), stdout=output, stderr=output, start_new_session=True)
        except (OSError, ValueError, IndexError) as error:
            raise ServerError(f"--server-command cannot be started: {error}") from None
        try:
            _wait_until_it_listens(process, url, start_s, log)
            yield
        finally:
            _stop(process)


def _wait_until_it_listens(process: subprocess.Popen[bytes], url: str, start_s: float, log: Path) -> None:
    deadline = time.monotonic() + start_s
    while not _listens(url):
        if process.poll() is not None:
            raise ServerError(f"--server-command ended with exit code {process.returncode}; {log} may say why")
        if time.monotonic() > deadline:
            raise ServerError(f"{url}: nobody listens {start_s:g} s after --server-command began; {log} may say why")
        time.sleep(_POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask politely, then kill; the whole group, for a server may have workers."""
    for number, patience_s in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            return


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname, parts.port or 80), timeout=1.0):
            return True
    except OSError:
        return False
