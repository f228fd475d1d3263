"""Connections as clients and attackers use them: offers of other protocols, HTTP/1.0, and what never ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import psutil
import pytest
from tests.server.conftest import NAME, Running
from tests.server.tools import PROMPT, process, steps_of, until

from isologit.common.processes import ServerProcess
from isologit.server import connections

BODY = json.dumps({"model": NAME, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}).encode()
OK = b"HTTP/1.1 200"


def connected(server: Running | ServerProcess) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 0), timeout=150)  # kernels may be compiled first


def head(*lines: str, first: str = "POST /v1/completions HTTP/1.1") -> bytes:
    return "\r\n".join([first, "host: t", "content-type: application/json", *lines, "", ""]).encode()


def all_of(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    content = b""
    with suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            content += part
    return content


def ask(server: Running, request: bytes) -> bytes:
    with connected(server) as connection:
        connection.sendall(request)
        return all_of(connection)


# -- offers of other protocols ----------------------------------------------------------------------------------------

LENGTH = f"content-length: {len(BODY)}"
CLOSE = "connection: close"


@pytest.mark.parametrize("offer", ["h2c", "websocket", "TLS/1.0", "anything, h2c"])
@pytest.mark.parametrize("connection", ["Upgrade, HTTP2-Settings", "upgrade", "close, Upgrade"])
def test_an_offer_of_another_protocol_is_ignored_and_the_body_read(
    server: Running, offer: str, connection: str
) -> None:
    """As Java's HttpClient and `curl --http2` send it."""
    more = (f"connection: {connection}", f"upgrade: {offer}", "http2-settings: AAEAAEAAAAIAAAAA")
    second = head(CLOSE, first="GET /health HTTP/1.1") if "close" not in connection else b""
    answer = ask(server, head(*more, LENGTH) + BODY + second)
    assert answer.startswith(OK)
    assert b'"text_completion"' in answer
    assert answer.count(OK) == (2 if second else 1)  # the next request is read as one
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    answer = ask(server, head(*more, "transfer-encoding: chunked") + chunks + second)
    assert answer.count(OK) == (2 if second else 1)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_an_offer_that_comes_in_pieces_is_ignored(server: Running, size: int) -> None:
    data = head("connection: Upgrade", "upgrade: h2c", LENGTH) + BODY + head(CLOSE, first="GET /health HTTP/1.1")
    with connected(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), size):
            connection.sendall(data[start : start + size])
        assert all_of(connection).count(OK) == 2


def test_a_websocket_handshake_gets_the_answer_of_its_path(server: Running) -> None:
    more = ("connection: upgrade, close", "upgrade: websocket", "sec-websocket-key: AAAA", "sec-websocket-version: 13")
    assert ask(server, head(*more, first="GET /health HTTP/1.1")).startswith(OK)
    assert ask(server, head(*more, first="GET /nothing HTTP/1.1")).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize(
    ("request_", "status", "word"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, b"use HTTP/1.1"),
        (b"CONNECT a.example:80 HTTP/1.1\r\nhost: a\r\n\r\n", 405, b"not a proxy"),
        (b"GET http://[ HTTP/1.1\r\nhost: a\r\n\r\n", 400, b"not a path"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, b"not HTTP/1.1"),
    ],
)
def test_what_is_not_spoken_is_refused_with_its_cause(
    server: Running, request_: bytes, status: int, word: bytes
) -> None:
    answer = ask(server, request_)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert word in answer


# -- HTTP/1.0 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_no_chunks(server: Running, stream: bool) -> None:
    body = json.dumps({**json.loads(BODY), "stream": stream}).encode()
    old = ask(server, head(f"content-length: {len(body)}", first="POST /v1/completions HTTP/1.0") + body)
    start, _, content = old.partition(b"\r\n\r\n")
    assert b"chunked" not in start
    assert b"connection: close" in start
    if stream:
        assert content.startswith(b"data: {")
        assert content.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(content)["usage"]["completion_tokens"] == 4
    new = ask(server, head(f"content-length: {len(body)}", CLOSE) + body)
    assert (b"transfer-encoding: chunked" in new.partition(b"\r\n\r\n")[0]) == stream


# -- what never ends --------------------------------------------------------------------------------------------------


def endless(line: bytes) -> Iterator[bytes]:
    part = line * ((1 << 16) // len(line) + 1)
    while True:
        yield part


CHUNKED = head("transfer-encoding: chunked")
LONG = json.dumps({**json.loads(BODY), "max_tokens": 400, "ignore_eos": True}).encode()
RUNNING = head(f"content-length: {len(LONG)}") + LONG
HALF = b"GET /health HTTP/1.1\r\nhost: t\r\n"
TINY = b"GET /health HTTP/1.1\r\n\r\n"
GREETING = head("content-length: 2") + b"{}"

ATTACKS = {
    "headers": (HALF, b"a: b\r\n", 431),
    "one header": (HALF + b"a: ", b"b", 431),
    "header name": (HALF, b"b", 431),
    "path": (b"GET /", b"a", 414),
    "query": (b"GET /health?", b"a", 414),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"a: b\r\n", 400),
    "one trailer": (CHUNKED + b"2\r\n{}\r\n0\r\na: ", b"b", 400),
    "chunk extension": (CHUNKED + b"2;", b"a=b;", 431),
    "chunk extensions": (CHUNKED, b"1;" + b"a" * 900 + b"\r\nx\r\n", 400),
    "chunk size": (CHUNKED, b"0", 431),
    "pipelined": (b"", TINY, 429),
    "headers behind an answer": (RUNNING + HALF, b"a: b\r\n", 431),
    "one header behind an answer": (RUNNING + HALF + b"a: ", b"b", 431),
    "pipelined behind an answer": (RUNNING, TINY, 429),
    "bodies behind an answer": (RUNNING + head("content-length: 99999999"), b"x", 429),
    "trailers behind an answer": (RUNNING + CHUNKED + b"2\r\n{}\r\n0\r\n", b"a: b\r\n", 400),
    "nothing but line ends": (b"", b"\r\n", 431),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_never_ends_ends_its_connection_with_a_status(server: Running, name: str) -> None:
    first, line, status = ATTACKS[name]
    data = first + b"".join(part for part, _ in zip(endless(line), range(3), strict=False))
    with connected(server) as connection:
        connection.settimeout(20)
        connection.sendall(data)
        answer = all_of(connection)
    assert b"HTTP/1.1 %d " % status in answer
    assert b"connection: close" in answer
    if first.startswith(RUNNING):
        assert answer.startswith(OK)  # what was taken is answered
        assert b'"completion_tokens": 400' in answer or b'"completion_tokens":400' in answer
    server.wait_idle()


@pytest.fixture(scope="module")
def attacked() -> Iterator[ServerProcess]:
    with process() as found:
        yield found


LARGEST_GROWTH_BYTES = 24 << 20
SENT_BYTES = 40 << 20


def send_endlessly(server: ServerProcess, first: bytes, line: bytes, most: int) -> int:
    """Send until the server ends the connection; returns how many bytes it took."""
    sent = 0
    with connected(server) as connection, suppress(ConnectionError, TimeoutError):
        connection.settimeout(5)
        connection.sendall(first)
        for part in endless(line):
            connection.sendall(part)
            sent += len(part)
            if sent >= most:
                break
    return sent


def test_memory_stays_flat_and_others_are_answered_while_it_is_attacked(attacked: ServerProcess) -> None:
    memory = psutil.Process(attacked.pid)
    assert httpx.get(f"{attacked.url}/health").status_code == 200
    for first, line, _ in ATTACKS.values():  # what the first use of anything takes
        send_endlessly(attacked, first, line, 1 << 17)
    before, slowest, over = memory.memory_info().rss, 0.0, threading.Event()

    def attack() -> None:
        for first, line, _ in ATTACKS.values():
            for _ in range(3):
                assert send_endlessly(attacked, first, line, SENT_BYTES) < SENT_BYTES
        over.set()

    attacker = threading.Thread(target=attack, daemon=True)
    attacker.start()
    peak = before
    with httpx.Client(base_url=attacked.url, timeout=20) as other:
        while not over.is_set() and attacker.is_alive():
            start = time.monotonic()
            assert other.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - start)
            peak = max(peak, memory.memory_info().rss)
            time.sleep(0.01)
    assert over.is_set()
    assert peak - before < LARGEST_GROWTH_BYTES
    assert slowest < 1.0


def test_without_the_limits_the_same_attack_is_kept_in_memory(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.Connection, "_check_limits", lambda self: None)
    with connected(server) as connection:
        connection.sendall(HALF + b"a: " + b"b" * 500_000)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(100)


def test_trailers_are_no_headers(server: Running) -> None:
    """Inverse of smuggling: what comes after the body changes nothing."""
    trailer = b"authorization: Bearer x\r\nconnection: keep-alive\r\n\r\n"
    answer = ask(server, head("transfer-encoding: chunked", CLOSE) + b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY) + trailer)
    assert answer.startswith(OK)


def test_a_fair_number_of_pipelined_requests_is_answered_in_order(server: Running) -> None:
    requests = TINY * 9 + head(LENGTH) + BODY + head(CLOSE, first="GET /v1/models HTTP/1.1")
    answer = ask(server, requests)
    assert answer.count(OK) == 11
    assert answer.index(b"text_completion") < answer.index(b"max_model_len")


def test_a_client_that_leaves_with_a_request_sent_ahead_is_cancelled(server: Running) -> None:
    with steps_of(server, 0.05) as steps:
        connection = connected(server)
        connection.sendall(RUNNING + TINY)
        steps.wait_for(3)
        connection.close()
        begun = len(steps.plans)
        server.wait_idle()
        assert len(steps.plans) - begun <= 1


def test_more_connections_than_the_limit_are_told_so(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    until(lambda: not server.uvicorn.server_state.tasks)
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", len(server.uvicorn.server_state.connections) + 2)
    with connected(server) as first, connected(server), connected(server) as third:
        assert third.recv(1000).startswith(b"HTTP/1.1 503")
        first.sendall(head(CLOSE, first="GET /health HTTP/1.1"))
        assert first.recv(1000).startswith(OK)
