"""Limits: what is refused, with which status, in the words of each dialect; and that nothing else is refused."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from tests.server.conftest import NAME, Running, running
from tests.server.tools import PROMPT, SPOKEN, Spoken, steps_of, until

from isologit import LLM
from isologit.config import EngineOptions
from isologit.errors import ConfigError
from isologit.server import connections, gate
from isologit.server.options import ServerOptions
from isologit.server.run import make_service
from isologit.workload import demo_model_path

every_dialect = pytest.mark.parametrize("spoken", SPOKEN, ids=lambda spoken: spoken.name)
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def reason(answer: httpx.Response) -> str:
    """Why a request was refused, wherever its dialect says so."""
    found = answer.json()
    error = found.get("detail") or found["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def post(server: Running, path: str, body: Any, **more: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60, **more)


# -- the queue --------------------------------------------------------------------------------------------------------


def burst(server: Running, spoken: Spoken, count: int, *, stream: bool) -> list[httpx.Response]:
    """Answers to requests sent at the same time, while no step is made until all of them were taken or refused."""
    answers: list[httpx.Response] = []
    path, body = spoken.request(tokens=3, stream=stream)
    threads = [threading.Thread(target=lambda: answers.append(post(server, path, body))) for _ in range(count)]
    responses = server.service.metrics.responses
    with steps_of(server) as steps:
        steps.gate.clear()
        before = responses[429]
        for thread in threads:
            thread.start()
        until(lambda: server.service.engine.num_unfinished + responses[429] - before == count)
        steps.gate.set()
        for thread in threads:
            thread.join(60)
    server.wait_idle()
    return answers


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    """One slot and a queue of two."""
    with running(ServerOptions(engine=EngineOptions(max_num_seqs=1), max_queue=2)) as found:
        yield found


@every_dialect
@both_ways
def test_a_full_queue_answers_429_and_says_when_to_try_again(small: Running, spoken: Spoken, stream: bool) -> None:
    answers = burst(small, spoken, 12, stream=stream)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 9
    assert all(answer.status_code == 200 for answer in answers if answer not in refused)
    assert all(int(answer.headers["retry-after"]) > 0 and "queue of 2 " in reason(answer) for answer in refused)
    assert post(small, *spoken.request(tokens=3, stream=stream)).status_code == 200


def test_a_larger_queue_refuses_nothing(server: Running) -> None:
    assert {answer.status_code for answer in burst(server, SPOKEN[1], 12, stream=True)} == {200}


def test_more_choices_than_ever_fit_are_a_mistake_and_not_a_full_queue(small: Running) -> None:
    answer = post(small, "/v1/completions", {"model": NAME, "prompt": [PROMPT, PROMPT], "n": 2, "max_tokens": 2})
    assert answer.status_code == 400
    assert "limit of 3" in reason(answer)
    assert post(small, "/v1/completions", {"model": NAME, "prompt": PROMPT, "n": 3, "max_tokens": 2}).is_success


# -- the body ---------------------------------------------------------------------------------------------------------

LARGEST = 20_000


@pytest.fixture(scope="module")
def narrow() -> Iterator[Running]:
    with running(ServerOptions(max_body_bytes=LARGEST)) as found:
        yield found


def padded(spoken: Spoken, size: int) -> bytes:
    """A good request of exactly so many bytes."""
    _, body = spoken.request(tokens=2)
    data = json.dumps(body).encode()
    return data + b" " * (size - len(data))


@every_dialect
@pytest.mark.parametrize("chunked", [False, True], ids=["with length", "chunked"])
@pytest.mark.parametrize("size", [LARGEST, LARGEST + 1, 5 * LARGEST, 100 * LARGEST])
def test_a_body_is_as_large_as_the_limit_at_most(narrow: Running, spoken: Spoken, chunked: bool, size: int) -> None:
    data = padded(spoken, size)
    content = (data[i : i + 7000] for i in range(0, size, 7000)) if chunked else data
    url, headers = narrow.url + spoken.whole_path, {"content-type": "application/json"}
    answer = httpx.post(url, content=content, headers=headers, timeout=60)
    if size <= LARGEST:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 413
        assert f"limit of {LARGEST} bytes" in reason(answer)


def connected(server: Running) -> socket.socket:
    """A bare connection, for clients that do not speak HTTP as they should."""
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 0), timeout=20)


def test_a_client_that_asks_first_is_refused_before_it_sends(narrow: Running) -> None:
    with connected(narrow) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nhost: t\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_bodies_that_are_too_large_together_are_refused_until_some_are_gone(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bound, each connection could hold one body of the largest size."""
    monkeypatch.setattr(gate, "_MOST_BODY_BYTES", 3 * LARGEST)
    server = start(max_body_bytes=LARGEST)
    head = f"POST /generate HTTP/1.1\r\nhost: t\r\ncontent-length: {LARGEST}\r\n\r\n".encode()
    data = padded(SPOKEN[1], LARGEST // 2)
    url, headers = server.url + SPOKEN[1].whole_path, {"content-type": "application/json"}
    with connected(server) as first, connected(server) as second, connected(server) as third:
        for connection in (first, second, third):
            connection.sendall(head + b"x" * (LARGEST - 1))
        until(lambda: httpx.post(url, content=data, headers=headers, timeout=60).status_code == 503)
        refused = httpx.post(url, content=data, headers=headers, timeout=60)
        assert int(refused.headers["retry-after"]) > 0
        assert "try again later" in reason(refused)
    until(lambda: httpx.post(url, content=data, headers=headers, timeout=60).status_code == 200)
    for _ in range(10):  # what was answered is given back
        assert httpx.post(url, content=data, headers=headers, timeout=60).status_code == 200


def test_a_body_that_does_not_come_is_given_up(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_LONGEST_BODY_S", 0.3)
    with connected(narrow) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nhost: t\r\ncontent-length: 50\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert connection.recv(1000) == b""


@pytest.mark.parametrize(("sent", "used"), [(b"", False), (b"POST /generate HT", False), (b"POST /generate HT", True)])
def test_a_request_that_never_begins_is_closed(
    narrow: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes, used: bool
) -> None:
    monkeypatch.setattr(connections, "LONGEST_HEAD_S", 0.3)
    with connected(narrow) as connection:
        if used:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.sendall(sent)
        with suppress(ConnectionResetError):
            assert connection.recv(1000) == b""
        assert httpx.get(f"{narrow.url}/health").status_code == 200


@pytest.mark.parametrize("head", [b"x: " + b"y" * 100_000, b"a: b\r\n" * 20_000], ids=["long line", "many lines"])
def test_a_head_without_end_is_cut_off(narrow: Running, head: bytes) -> None:
    with connected(narrow) as connection, suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\n" + head)
        assert not connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert httpx.get(f"{narrow.url}/health", headers={"x": "y" * 30_000}).status_code == 200


def test_what_comes_after_a_refusal_holds_nothing(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LONGEST_HEAD_S", 0.3)
    with connected(narrow) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nhost: t\r\ncontent-length: 99999999\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
        connection.sendall(b"x" * 1000)
        with suppress(ConnectionResetError):
            while connection.recv(1000):
                pass


@pytest.mark.parametrize(
    "line", [b"GET /\xff HTTP/1.1", b"GET http://[ HTTP/1.1", b"GET /a b HTTP/9.9", b"\x00\x01\x02"]
)
def test_lines_that_are_not_http_are_refused(narrow: Running, line: bytes) -> None:
    with connected(narrow) as connection:
        connection.sendall(line + b"\r\nhost: t\r\n\r\n")
        assert connection.recv(1000)[:10] in (b"HTTP/1.1 4", b"")


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": [{}] * 400_000},
        {"prompt": [[0.5]] * 300_000},
        {"prompt": PROMPT, "stop": [0] * 400_000},
        {"prompt": PROMPT, "stop_token_ids": [""] * 400_000},
        {"messages": [0] * 400_000},
        {"messages": [{"role": "user", "content": [0] * 400_000}]},
        {"prompt": PROMPT, "logit_bias": {str(i): "" for i in range(100_000)}},
        {"prompt": "a" * 3_000_000, "max_tokens": 1},
        {"prompt": [1] * 1_000_000, "max_tokens": 1},
        {"prompt": PROMPT, "stop": ["a" * 1_000_000] * 2},
        {"prompt": PROMPT, "bad_words": ["a"] * 1_000_000},
        {"prompt": PROMPT, "allowed_token_ids": [-1] * 400_000},
    ],
    ids=[
        "prompts",
        "token ids",
        "stops",
        "stop ids",
        "messages",
        "parts",
        "biases",
        "long prompt",
        "many ids",
        "long stops",
        "bad words",
        "allowed ids",
    ],
)
def test_a_large_body_full_of_mistakes_is_refused_quickly(server: Running, wrong: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in wrong else "/v1/completions"
    start = time.monotonic()
    answer = post(server, path, {"model": NAME, **wrong})
    assert answer.status_code == 400
    assert len(answer.content) < 5000
    assert time.monotonic() - start < 5


# -- the length of a prompt -------------------------------------------------------------------------------------------


@every_dialect
@both_ways
def test_a_prompt_that_is_too_long_is_refused_and_the_limit_named(
    start: Callable[..., Running], spoken: Spoken, stream: bool
) -> None:
    server = start(max_model_len=64)
    path, body = spoken.request(PROMPT, 200, stream=stream)
    answer = post(server, path, body)
    if spoken.name == "llm-serving":  # its protocol has no status for it
        assert answer.status_code == 200
        assert "Error202: prompt out of range" in answer.text
    else:
        assert 400 <= answer.status_code < 500
        assert "must be <= 64." in reason(answer) or "maximum context length is 64 tokens" in reason(answer)
    server.wait_idle()
    assert post(server, *spoken.request(PROMPT, 20, stream=stream)).status_code == 200


@pytest.mark.parametrize(
    ("limits", "option"),
    [
        ({"max_queue": 0}, "--max-queue"),
        ({"max_body_bytes": 0}, "--max-body-bytes"),
        ({"max_model_len": 1}, "--max-model-len"),
        ({"request_timeout_s": 0.0}, "--request-timeout"),
        ({"request_timeout_s": float("nan")}, "--request-timeout"),
    ],
)
def test_a_senseless_limit_is_refused_before_a_model_is_loaded(limits: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        ServerOptions(**limits)


def test_a_request_that_no_memory_could_hold_is_refused_when_it_arrives() -> None:
    llm = LLM(demo_model_path(), num_threads=1, kv_cache_memory_bytes=800_000)
    try:
        service = make_service(llm, ServerOptions(), NAME)
        blocks = service.engine.engine.scheduler.blocks
        assert service.limits.max_model_len == blocks.num_blocks * blocks.block_size + 1 < llm.max_model_len
    finally:
        llm.close()


# -- time -------------------------------------------------------------------------------------------------------------


@every_dialect
@both_ways
def test_a_request_that_takes_too_long_is_ended(hasty: Running, spoken: Spoken, stream: bool) -> None:
    with steps_of(hasty, 0.05):
        answer = post(hasty, *spoken.request(tokens=60, stream=stream))
        hasty.wait_idle()
    if not stream:
        assert answer.status_code == 504
        assert "limit of 0.4 s" in reason(answer)
        return
    assert answer.status_code == 200
    messages = spoken.messages(answer.content)
    assert any(message.is_token for message in messages)
    errors = [message.error for message in messages if message.error]
    assert len(errors) == 1
    assert ("error304" if spoken.name == "llm-serving" else "limit of 0.4 s") in errors[0]
    assert not any(message.final and not message.error for message in messages if message.finish_reason)
    assert post(hasty, *spoken.request(tokens=3, stream=stream)).status_code == 200


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    with running(ServerOptions(request_timeout_s=0.4)) as found:
        yield found


@every_dialect
def test_without_the_limit_the_same_request_is_answered(server: Running, spoken: Spoken) -> None:
    with steps_of(server, 0.05):
        assert post(server, *spoken.request(tokens=12)).status_code == 200


def test_time_in_the_queue_counts(start: Callable[..., Running]) -> None:
    server = start(request_timeout_s=0.5, engine=EngineOptions(max_num_seqs=1))
    path, body = SPOKEN[1].request(tokens=100)
    answers: list[httpx.Response] = []
    with steps_of(server, 0.05):
        threads = [threading.Thread(target=lambda: answers.append(post(server, path, body))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [answer.status_code for answer in answers] == [504] * 3
        server.wait_idle()


# -- the key ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(ServerOptions(api_key="sesame")) as found:
        yield found


@every_dialect
@pytest.mark.parametrize("given", [None, "", "Bearer wrong", "Bearer", "sesame", "Bearer sesame2", "Bearer SESAME"])
def test_without_the_key_nothing_is_answered(locked: Running, spoken: Spoken, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    for stream in (False, True):
        path, body = spoken.request(tokens=2, stream=stream)
        answer = post(locked, path, body, headers=headers)
        assert answer.status_code == 401
        assert "API key" in reason(answer)
        assert post(locked, path, body, headers={"authorization": "Bearer sesame"}).status_code == 200


def test_health_is_open_and_nothing_else_is(locked: Running) -> None:
    assert httpx.get(f"{locked.url}/health").status_code == 200
    for path in ("/metrics", "/v1/models", "/info", "/docs", "/openapi.json", "/serving/get_bs", "/nothing"):
        assert httpx.get(locked.url + path).status_code == 401


def test_a_large_body_without_the_key_still_learns_why(locked: Running) -> None:
    answer = httpx.post(f"{locked.url}/generate", content=b"x" * 3_000_000, timeout=20)
    assert answer.status_code == 401


def test_an_empty_key_is_a_mistake(start: Callable[..., Running]) -> None:
    with pytest.raises(ConfigError, match="API key is empty"):
        start(api_key="")


def test_without_a_key_everything_is_open(server: Running) -> None:
    assert httpx.get(f"{server.url}/metrics").status_code == 200


# -- text that is not Unicode -----------------------------------------------------------------------------------------

LONE = "\ud800"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *[(s.request(LONE, stream=stream)) for s in SPOKEN for stream in (False, True)],
        *[(s.request("a" * 9000 + LONE, stream=stream)) for s in SPOKEN for stream in (False, True)],
        ("/v1/completions", {"model": LONE, "prompt": "a"}),
        ("/v1/completions", {"model": NAME, "prompt": ["a", LONE]}),
        ("/v1/completions", {"model": NAME, "prompt": "a", "logit_bias": {LONE: LONE}}),
        ("/v1/completions", {"model": NAME, "prompt": {LONE: 1}}),
        ("/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "a", LONE: 1}], "n": LONE}),
        ("/v1/chat/completions", {"model": NAME, "messages": [{"role": LONE, "content": LONE}]}),
        ("/generate", {"inputs": LONE, "parameters": {"return_full_text": True, "truncate": 1}}),
        ("/models/%ED%A0%80/generate", {"inputs": "a"}),
        ("/%ED%A0%80", {"inputs": "a"}),
    ],
)  # fmt: skip
def test_lone_surrogates_are_the_clients_mistake(server: Running, path: str, body: dict[str, Any]) -> None:
    content = json.dumps(body)  # ASCII, the surrogate escaped
    answer = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"}, timeout=20)
    assert 400 <= answer.status_code < 500
    assert reason(answer)


@every_dialect
def test_whole_characters_beyond_the_basic_plane_are_fine(server: Running, spoken: Spoken) -> None:
    path, body = spoken.request("\U0001f98a", 4)
    assert r"\ud83e\udd8a" in json.dumps(body)
    answer = httpx.post(server.url + path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 200


# -- everything else --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/nothing", "/models/llama2/nothing/else", "/nothing"])
def test_unknown_paths_and_methods_are_told_in_the_dialects_form(http: httpx.Client, path: str) -> None:
    missing = http.get(path)
    assert missing.status_code == 404
    assert reason(missing)
    wrong = http.put({"/v1/nothing": "/v1/completions", "/nothing": "/generate"}.get(path, "/models/llama2/generate"))
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"


@every_dialect
@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"1" * 5000, b"\xff\xfe", b"null", b"NaN"])
def test_what_is_not_json_is_refused(http: httpx.Client, spoken: Spoken, content: bytes) -> None:
    answer = http.post(spoken.whole_path, content=content, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert reason(answer)
