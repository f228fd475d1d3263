"""A server process is up when the block begins and gone, with its workers, when it ends."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from isologit.common.processes import ServerStartError, listens, server_process

SAYS_WHERE = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 0))
print("loading http://somewhere/without/a/port", flush=True)
print("serving at http://127.0.0.1:%d" % listener.getsockname()[1], end="", flush=True)
time.sleep(0.2)
print(" now", flush=True)
time.sleep(60)
"""
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
WITH_A_WORKER = f"""
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", {STUBBORN!r} + "import time; time.sleep(60)"])
print("worker", worker.pid, flush=True)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_it_says_where_it_serves_and_leaves_when_the_block_ends() -> None:
    with server_process(python(SAYS_WHERE)) as server:
        assert listens(server.url)
        assert server.output.endswith(f"serving at {server.url} now\n")
    assert not listens(server.url)
    assert not psutil.pid_exists(server.pid)


def test_it_is_waited_for_at_an_address_that_is_known(tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "new" / "server.log"
    for _ in range(2):  # the log is added to
        with server_process(python(SAYS_WHERE, str(port)), url=f"http://127.0.0.1:{port}", log=log) as server:
            assert listens(server.url)
            assert server.output.count("serving at") <= 1
    assert log.read_text().count("serving at") == 2


def test_what_ignores_the_polite_signal_is_killed_and_its_workers_too() -> None:
    start = time.monotonic()
    with server_process(python(STUBBORN + WITH_A_WORKER + SAYS_WHERE), stop_s=0.2) as server:
        worker = int(server.output.split()[1])
        assert psutil.pid_exists(worker)
    assert time.monotonic() - start < 20
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE


def test_workers_of_a_server_that_crashed_do_not_outlive_it() -> None:
    with server_process(python(WITH_A_WORKER + SAYS_WHERE)) as server:
        worker = int(server.output.split()[1])
        server.send_signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        assert psutil.pid_exists(worker)  # the inverse: until the block ends it does
    deadline = time.monotonic() + 10
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_exit_codes() -> None:
    with server_process(python(SAYS_WHERE.replace("sleep(60)", "sleep(0.3); sys.exit(3)"))) as server:
        with pytest.raises(TimeoutError, match="still runs after 0"):
            server.wait(0)
        assert server.wait() == 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["/no/such/program"], "cannot be started"),
        (python("print('no model there'); raise SystemExit(7)"), 'exit code 7 .* "no model there"'),
        (python("pass"), "exit code 0 before it served; it wrote nothing"),
        (python("import time; time.sleep(60)"), "nobody listens 0.5 s after"),
    ],
)
def test_a_server_that_does_not_come_up_is_one_line(command: list[str], message: str) -> None:
    with (
        pytest.raises(ServerStartError, match=message) as error,
        server_process(command, start_s=0.5 if "sleep" in command[-1] else 20),
    ):
        pass
    assert "\n" not in str(error.value)


def test_somebody_elses_server_is_not_taken_for_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ServerStartError, match="another server listens"), server_process(python("pass"), url=url):
            pass
