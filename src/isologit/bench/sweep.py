"""The same requests at several rates, against one server or against one that is started anew for each rate."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from isologit.bench.options import ServingOptions
from isologit.bench.serving import Measurement, measure_server
from isologit.common.processes import server_process
from isologit.common.progress import Observer, Silent
from isologit.errors import ConfigError

SERVER_LOG = "server.log"


def run_sweep(
    options: ServingOptions,
    request_rates: Sequence[float],
    *,
    server_command: str | None = None,
    server_start_s: float = 600.0,
    log_folder: Path = Path("."),
    observer: Observer | None = None,
    keep: Callable[[Measurement], object] | None = None,
) -> Iterator[Measurement]:
    """Yield a detailed measurement for every rate, in the order given; it ends early when the one server is gone,
    or a signal interrupts.

    server_command: starts the server for each rate, so that no cache outlives one; its output goes to `server.log` in
    `log_folder`. server_start_s: how long it may take to listen. keep: see `measure_server`. Raises ConfigError for bad
    rates or a bad command, ServerStartError when a server does not come up, and what `measure_server` raises.
    """
    if not request_rates:
        raise ConfigError("--request-rates is empty; give numbers with commas between them, such as 5,10,inf")
    command = _split(server_command)
    observer = observer or Silent()
    each = [replace(options, request_rate=rate) for rate in request_rates]
    for one in each:
        with contextlib.ExitStack() as stack:
            if command is not None:
                observer.stage("start the server")
                log = log_folder / SERVER_LOG
                stack.enter_context(server_process(command, url=one.server_url, log=log, start_s=server_start_s))
            measurement = measure_server(one, detailed=True, observer=observer, keep=keep)
        yield measurement
        if measurement.run.interrupted or (measurement.run.server_gone and command is None):
            return


def _split(command: str | None) -> list[str] | None:
    """The words of a command as a shell would split it. Raises ConfigError."""
    if command is None:
        return None
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--server-command cannot be read ({error}); check its quotes") from None
    if not words:
        raise ConfigError("--server-command is empty; leave it out, or give a command such as: isologit serve")
    return words
