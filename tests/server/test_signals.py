"""Signals to a real process: the first drains, the second leaves at once, and a kill leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from tests.server.conftest import NAME
from tests.server.tools import SPOKEN, Spoken, process, raw_request, until

from isologit.common.processes import ServerProcess

both_signals = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])

SLOW = """
import time
from isologit.engine.runner import Runner
execute = Runner.execute
def slowly(self, plan):
    time.sleep(0.03)
    return execute(self, plan)
Runner.execute = slowly
"""


class Reading(threading.Thread):
    """A stream that is read as it comes."""

    def __init__(self, server: ServerProcess, spoken: Spoken, tokens: int) -> None:
        super().__init__(daemon=True)
        self.server, self.spoken, self.tokens = server, spoken, tokens
        self.content = b""
        self.broken = False
        self.start()

    def run(self) -> None:
        path, body = self.spoken.request(tokens=self.tokens, stream=True)
        try:
            with httpx.stream("POST", self.server.url + path, json=body, timeout=60) as answer:
                for part in answer.iter_raw():
                    self.content += part
        except httpx.HTTPError:
            self.broken = True

    @property
    def is_complete(self) -> bool:
        messages = self.spoken.messages(self.content)
        return not self.broken and any(message.final for message in messages) and not any(m.error for m in messages)


@contextlib.contextmanager
def streaming(tokens: int = 40) -> Iterator[tuple[ServerProcess, list[Reading]]]:
    """A slow server in the middle of a stream of every dialect."""
    with process(before=SLOW) as server:
        readings = [Reading(server, spoken, tokens) for spoken in SPOKEN]
        until(lambda: all(reading.content for reading in readings))
        yield server, readings


@both_signals
def test_the_first_signal_drains_and_refuses_what_is_new(number: signal.Signals) -> None:
    with streaming() as (server, readings):
        server.send_signal(number)
        refusals: list[httpx.Response] = []
        for spoken in SPOKEN:
            path, body = spoken.request()
            until(lambda: not refusals or refusals[-1].status_code == 503)
            refusals.append(httpx.post(server.url + path, json=body, timeout=10))
        assert not any(reading.is_complete for reading in readings)
        assert [answer.status_code for answer in refusals] == [503] * 4
        assert all("shutting down" in answer.text and answer.headers["retry-after"] for answer in refusals)
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        assert server.wait() == 0
        for reading in readings:
            reading.join(10)
        assert all(reading.is_complete for reading in readings)
        assert "Traceback" not in server.output


@both_signals
def test_the_second_signal_leaves_at_once(number: signal.Signals) -> None:
    with streaming(tokens=900) as (server, readings):
        server.send_signal(number)
        path, body = SPOKEN[1].request()
        until(lambda: httpx.post(server.url + path, json=body, timeout=10).status_code == 503)
        start = time.monotonic()
        server.send_signal(signal.SIGTERM if number is signal.SIGINT else signal.SIGINT)
        assert server.wait() == 130
        assert time.monotonic() - start < 2
        for reading in readings:
            reading.join(10)
        assert not any(reading.is_complete for reading in readings)


def test_without_requests_it_leaves_soon() -> None:
    with process() as server, httpx.Client(base_url=server.url) as idle:
        assert idle.get("/health").status_code == 200  # and the connection stays open
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - start < 5


def test_a_client_that_does_not_read_cannot_stop_it_from_leaving() -> None:
    with process(before="from isologit.server import run\nrun._LONGEST_GOODBYE_S = 1") as server:
        body = {"model": "llama2", "prompt": "a", "n": 24, "max_tokens": 400, "logprobs": 20, "stream": True}
        lazy = raw_request(server.url, "/v1/completions", {**body, "ignore_eos": True}, buffer=4096)
        until(lambda: "vllm:num_requests_running{" in httpx.get(f"{server.url}/metrics").text)
        server.send_signal(signal.SIGTERM)
        assert server.wait(40) == 0
        lazy.close()


def is_alive(child: psutil.Process) -> bool:
    """Whether it still does anything; one that ended may wait for whoever reaps it."""
    try:
        return child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_kill_leaves_nothing() -> None:
    with streaming(tokens=900) as (server, readings):
        port = httpx.URL(server.url).port
        children = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        for reading in readings:
            reading.join(10)
        assert not any(reading.is_complete for reading in readings)
        until(lambda: not any(map(is_alive, children)))  # a worker ends when nobody is at the other end
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port or 0))


def test_it_listens_on_this_machine_only_and_only_once_it_says_so() -> None:
    with process() as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        listening = [c for c in psutil.Process(server.pid).net_connections("tcp") if c.status == "LISTEN"]
        assert [c.laddr.ip for c in listening] == ["127.0.0.1"]
        assert json.loads(httpx.get(f"{server.url}/info").text)["model_id"] == NAME
