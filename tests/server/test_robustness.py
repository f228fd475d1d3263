"""What clients and steps may do to each other: nothing. Every guarantee is also tried with its guard taken away."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.types import Receive
from tests.server.conftest import NAME, Running, running
from tests.server.tools import PROMPT, SPOKEN, Spoken, process, raw_request, steps_of, until

from isologit.common.processes import ServerProcess
from isologit.config import EngineOptions
from isologit.engine.request import GenerationRequest
from isologit.server import service as service_module
from isologit.server.options import ServerOptions

SECRET = "Xyzzy the password is plugh"
every_dialect = pytest.mark.parametrize("spoken", SPOKEN, ids=lambda spoken: spoken.name)
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def post(server: Running | ServerProcess, spoken: Spoken, tokens: int = 8, *, stream: bool = False) -> httpx.Response:
    path, body = spoken.request(tokens=tokens, stream=stream)
    return httpx.post(server.url + path, json=body, timeout=60)


class Posting(threading.Thread):
    """A request on its way."""

    def __init__(
        self, server: Running | ServerProcess, spoken: Spoken, tokens: int = 8, *, stream: bool = False
    ) -> None:
        super().__init__(daemon=True)
        self.arguments = (server, spoken, tokens, stream)
        self.answer: httpx.Response | Exception | None = None
        self.start()

    def run(self) -> None:
        server, spoken, tokens, stream = self.arguments
        try:
            self.answer = post(server, spoken, tokens, stream=stream)
        except httpx.HTTPError as error:
            self.answer = error

    def result(self) -> httpx.Response:
        self.join(60)
        assert isinstance(self.answer, httpx.Response), self.answer
        return self.answer


# -- clients that leave -----------------------------------------------------------------------------------------------


def steps_after_leaving(server: Running, path: str, body: dict[str, Any]) -> int:
    """Steps that begin after a client of a running request has disconnected."""
    with steps_of(server, 0.05) as steps:
        connection = raw_request(server.url, path, body)
        steps.wait_for(3)
        assert server.service.engine.engine.scheduler.num_running
        connection.close()
        begun = len(steps.plans)
        server.wait_idle()
        return len(steps.plans) - begun


@every_dialect
@both_ways
def test_a_client_that_leaves_is_cancelled_within_a_step(server: Running, spoken: Spoken, stream: bool) -> None:
    assert steps_after_leaving(server, *spoken.request(tokens=200, stream=stream)) <= 1


@every_dialect
@both_ways
def test_without_the_watch_its_request_runs_to_the_end(
    server: Running, spoken: Spoken, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(receive: Receive) -> None:
        await asyncio.sleep(5)

    monkeypatch.setattr(service_module, "_disconnect", never)
    assert steps_after_leaving(server, *spoken.request(tokens=12, stream=stream)) >= 8


@both_ways
def test_all_choices_of_a_client_that_leaves_are_cancelled(server: Running, stream: bool) -> None:
    body = {"model": NAME, "prompt": [PROMPT, "List 4 tools.\n"], "n": 3, "max_tokens": 200, "stream": stream}
    assert steps_after_leaving(server, "/v1/completions", body) <= 1


@both_ways
def test_a_client_that_leaves_while_it_waits_is_never_run(start: Callable[..., Running], stream: bool) -> None:
    server = start(engine=EngineOptions(max_num_seqs=1))
    engine = server.service.engine
    with steps_of(server, 0.01) as steps:
        first = Posting(server, SPOKEN[1], 30)
        steps.wait_for(2)
        waiting = raw_request(server.url, *SPOKEN[1].request(tokens=200, stream=stream))
        until(lambda: engine.num_unfinished == 2)
        waiting.close()
        until(lambda: engine.num_unfinished == 1)
        assert first.result().status_code == 200
        server.wait_idle()
    assert {name for plan in steps.plans for name in plan} == set(steps.plans[0])
    assert engine.engine.scheduler.num_waiting == 0


def test_leaving_while_the_body_is_sent_leaves_nothing(server: Running) -> None:
    before = len(server.uvicorn.server_state.connections)
    for sent in (b"", b"{", b'{"inputs": "a"'):
        connection = raw_request(server.url, "/generate", {})
        connection.close()
        connection = raw_request(server.url, "/health", {})
        connection.sendall(b"POST /generate HTTP/1.1\r\nhost: t\r\ncontent-length: 99\r\n\r\n" + sent)
        connection.close()
    until(lambda: len(server.uvicorn.server_state.connections) <= before)
    until(lambda: not server.uvicorn.server_state.tasks)
    server.wait_idle()


# -- clients that do not read -----------------------------------------------------------------------------------------

LARGE = {"model": NAME, "prompt": PROMPT, "n": 24, "max_tokens": 400, "temperature": 0, "logprobs": 20, "stream": True}
LARGE = {**LARGE, "ignore_eos": True}


def received(connection: Any) -> bytes:
    """Everything a connection still has to say, up to the end of the answer."""
    content = b""
    while not content.endswith(b"0\r\n\r\n"):
        part = connection.recv(1 << 16)
        assert part
        content += part
    return content


def test_a_client_that_does_not_read_holds_up_nobody_and_loses_nothing(server: Running) -> None:
    """Its requests finish and give back their blocks while it still reads nothing; what it was owed waits for it."""
    with steps_of(server, 0.002):
        lazy = raw_request(server.url, "/v1/completions", LARGE, buffer=4096)
        until(lambda: server.service.engine.num_unfinished == 24)
        assert [Posting(server, spoken, 20).result().status_code for spoken in SPOKEN] == [200] * 4
        server.wait_idle()
    [task] = server.uvicorn.server_state.tasks
    assert not task.done()  # the answer is written no faster than it is read
    assert post(server, SPOKEN[0], 20).status_code == 200
    content = received(lazy)
    lazy.close()
    events = [json.loads(line[6:]) for line in content.split(b"\n") if line.startswith(b"data: {")]
    counts = [0] * 24
    for event in events:
        [choice] = event["choices"]
        counts[choice["index"]] += len(choice["logprobs"]["tokens"])
    assert counts == [400] * 24
    assert b"data: [DONE]" in content


def test_a_client_that_reads_nothing_for_long_is_closed(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isologit.server.run.LONGEST_STALL_S", 1.0)
    server = start()
    lazy = raw_request(server.url, "/v1/completions", LARGE, buffer=4096)
    until(lambda: server.service.engine.num_unfinished == 24)
    assert server.uvicorn.server_state.connections
    until(lambda: not server.uvicorn.server_state.connections)
    until(lambda: not server.uvicorn.server_state.tasks)
    server.wait_idle()
    lazy.close()


# -- steps that fail --------------------------------------------------------------------------------------------------


def assert_failed(spoken: Spoken, answer: httpx.Response, *, stream: bool) -> None:
    """In the words of the dialect."""
    if stream:
        assert answer.status_code == 200
        errors = [message.error for message in spoken.messages(answer.content) if message.error]
        assert len(errors) == 1
        assert ("error304" if spoken.name == "llm-serving" else "step failed") in errors[0]
    elif spoken.name == "llm-serving":
        assert answer.status_code == 200
        assert answer.json()["generated_text"].startswith("error304: generation task stop abnormally")
        assert answer.json()["finish_reason"] == "predict_failed"
    elif spoken.name == "tgi":
        assert answer.status_code == 424
        assert answer.json()["error_type"] == "generation"
    else:
        assert answer.status_code == 500
        assert "step failed" in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def two_slots() -> Iterator[Running]:
    with running(ServerOptions(engine=EngineOptions(max_num_seqs=2))) as found:
        yield found


@every_dialect
@both_ways
def test_a_failed_step_fails_its_requests_and_no_others(two_slots: Running, spoken: Spoken, stream: bool) -> None:
    server = two_slots
    good = post(server, spoken, 20, stream=stream).content
    with steps_of(server, 0.03) as steps:
        inside = [Posting(server, spoken, 20, stream=stream) for _ in range(2)]
        until(lambda: bool(steps.plans) and len(steps.plans[-1]) == 2)
        steps.gate.clear()
        waiting = [Posting(server, spoken, 20, stream=stream) for _ in range(2)]
        until(lambda: server.service.engine.num_unfinished == 4)
        steps.failures.append(RuntimeError("broken on purpose"))
        steps.gate.set()
        for request in inside:
            assert_failed(spoken, request.result(), stream=stream)
        texts = [request.result().content for request in waiting]
        server.wait_idle()
    messages = [spoken.messages(text) if stream else spoken.text(json.loads(text)) for text in (good, *texts)]
    assert messages[0] == messages[1] == messages[2] or spoken.name in ("completions", "chat")
    assert all("error" not in text.decode() for text in texts)


def test_failures_that_are_not_in_a_row_end_nothing(start: Callable[..., Running]) -> None:
    server = start()
    with steps_of(server) as steps:
        for _ in range(3):
            steps.failures += [RuntimeError(), RuntimeError()]
            for _ in range(2):
                assert_failed(SPOKEN[1], post(server, SPOKEN[1]), stream=False)
            assert post(server, SPOKEN[1]).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200


@every_dialect
@both_ways
def test_three_failures_in_a_row_end_the_server(start: Callable[..., Running], spoken: Spoken, stream: bool) -> None:
    server = start(engine=EngineOptions(max_num_seqs=1))
    with steps_of(server) as steps:
        steps.gate.clear()
        steps.failures += [RuntimeError()] * 3
        requests = [Posting(server, spoken, stream=stream) for _ in range(5)]
        until(lambda: server.service.engine.num_unfinished == 5)
        steps.gate.set()
        for request in requests:
            answer = request.result()
            errors = [message.error for message in spoken.messages(answer.content)] if stream else [answer.text]
            assert any(error and ("failed" in error or "error304" in error) for error in errors)
    assert server.service.engine.failed
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 503
    assert "3 steps in a row failed" in health.json()["error"]
    assert post(server, spoken, stream=stream).status_code in (200, 424, 500)  # llm-serving tells it in band
    until(lambda: server.uvicorn.should_exit, 10)


def test_an_engine_thread_that_dies_leaves_nobody_waiting(start: Callable[..., Running]) -> None:
    server = start()
    with steps_of(server, 0.02) as steps:
        requests = [Posting(server, spoken, 200) for spoken in SPOKEN]
        steps.wait_for(3)
        server.service.engine._inbox.put(lambda: exec("raise MemoryError"))
        for spoken, request in zip(SPOKEN, requests, strict=True):
            answer = request.result()
            assert answer.status_code == (200 if spoken.name == "llm-serving" else 424 if spoken.name == "tgi" else 500)
            assert "MemoryError" in answer.text or "error304" in answer.text
    assert httpx.get(f"{server.url}/health").status_code == 503
    until(lambda: server.uvicorn.should_exit, 10)


@every_dialect
def test_an_unexpected_error_is_told_in_the_dialects_form_and_hurts_nobody(
    server: Running, spoken: Spoken, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **more: Any) -> GenerationRequest:
        raise KeyError(SECRET)

    with monkeypatch.context() as patch:
        patch.setattr(server.service, "request", broken)
        answer = post(server, spoken)
    assert answer.status_code == (424 if spoken.name == "tgi" else 500)
    assert "KeyError" in answer.text
    assert "plugh" not in answer.text + caplog.text
    assert "a request failed: KeyError" in caplog.text
    assert post(server, spoken).status_code == 200


# -- a whole process --------------------------------------------------------------------------------------------------

BREAK_STEPS = """
from isologit.engine.runner import Runner
def execute(self, plan): raise ValueError("SECRET")
Runner.execute = execute
""".replace("SECRET", SECRET)
BREAK_HANDLERS = """
from isologit.server.service import Service
def request(self, *args, **more): raise ValueError("SECRET")
Service.request = request
""".replace("SECRET", SECRET)
LOG_MESSAGES = """
import sys
from isologit.common import logs
from isologit.engine import async_engine
from isologit.server import gate
def log_error(what, error): print(what, error, file=sys.stderr)
logs.log_error = gate.log_error = async_engine.log_error = log_error
"""


def ask_everything(server: ServerProcess) -> None:
    """Good and bad requests, all of them with the secret in the prompt."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for spoken in SPOKEN:
            for stream in (False, True):
                path, body = spoken.request(SECRET, 4, stream=stream)
                try:
                    client.post(path, json=body)
                    client.post(path, json={**body, "stream": SECRET, "n": SECRET, "parameters": SECRET})
                    client.post(path, content=json.dumps(body)[:-1])
                    client.post(f"/{SECRET}", json=body)
                    client.post(path, json=spoken.request(SECRET * 2000, 4, stream=stream)[1])
                except httpx.TransportError:
                    return  # it has left, as it should


@pytest.mark.parametrize("broken", ["", BREAK_HANDLERS], ids=["well", "broken handlers"])
def test_no_prompt_is_ever_logged(broken: str) -> None:
    with process(before=broken) as server:
        ask_everything(server)
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert SECRET not in server.output
    assert "plugh" not in server.output
    assert ("a request failed: ValueError" in server.output) == bool(broken)


def test_an_engine_that_cannot_go_on_ends_the_process_with_1_and_logs_no_prompt() -> None:
    with process(before=BREAK_STEPS) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        ask_everything(server)
        assert server.wait() == 1
    assert server.output.count("a step failed: ValueError") == 3
    assert "plugh" not in server.output


def test_the_check_for_prompts_in_logs_finds_one() -> None:
    with process(before=BREAK_STEPS + LOG_MESSAGES) as server:
        ask_everything(server)
        assert server.wait() == 1
    assert SECRET in server.output


def test_a_failing_server_gives_its_clients_the_last_word() -> None:
    with process(before=BREAK_STEPS) as server:
        for _ in range(3):
            requests = [Posting(server, spoken, stream=stream) for spoken in SPOKEN for stream in (False, True)]
            assert all(request.result().content for request in requests)
        start = time.monotonic()
        assert server.wait() == 1
        assert time.monotonic() - start < 10
