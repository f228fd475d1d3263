"""The dialects as tests speak them, and a hand on the engine's steps."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from tests.server.conftest import NAME, Running

from isologit.bench.dialects import DIALECTS, Dialect
from isologit.bench.streams import Message, MessageStream
from isologit.common.processes import ServerProcess, server_process
from isologit.engine.runner import StepResult
from isologit.engine.scheduler import StepPlan

PROMPT = "Count from 3 to 30.\n"


@dataclass(frozen=True)
class Spoken:
    """One dialect: where whole answers and streams are asked for, and what is asked."""

    name: str
    whole_path: str
    stream_path: str
    body: Callable[[str, int], dict[str, Any]]
    stream_flag: dict[str, Any]
    dialect: Dialect

    def request(self, prompt: str = PROMPT, tokens: int = 8, *, stream: bool = False) -> tuple[str, dict[str, Any]]:
        """Path and body."""
        if stream:
            return self.stream_path, {**self.body(prompt, tokens), **self.stream_flag}
        return self.whole_path, self.body(prompt, tokens)

    def text(self, answer: dict[str, Any]) -> str:
        """The text of a whole answer."""
        if "choices" in answer:
            choice = answer["choices"][0]
            return str(choice["text"] if "text" in choice else choice["message"]["content"])
        return str(answer["generated_text"])

    def messages(self, content: bytes) -> list[Message]:
        """What a stream said."""
        stream = MessageStream(self.dialect.read)
        return [*stream.feed(content), *stream.finish()]


def _contest(prompt: str, tokens: int) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"do_sample": False, "max_new_tokens": tokens}}


def _completion(prompt: str, tokens: int) -> dict[str, Any]:
    return {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0}


def _chat(prompt: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt.removesuffix("\n")}]  # the template adds it
    return {"model": NAME, "messages": messages, "max_tokens": tokens, "temperature": 0}


def _tgi(prompt: str, tokens: int) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": tokens}}


SPOKEN = [
    Spoken(
        "llm-serving", "/models/llama2/generate", "/models/llama2/generate_stream", _contest, {},
        DIALECTS["llm-serving"],
    ),
    Spoken("completions", "/v1/completions", "/v1/completions", _completion, {"stream": True}, DIALECTS["openai"]),
    Spoken("chat", "/v1/chat/completions", "/v1/chat/completions", _chat, {"stream": True}, DIALECTS["openai-chat"]),
    Spoken("tgi", "/generate", "/generate_stream", _tgi, {}, DIALECTS["tgi"]),
]  # fmt: skip


@dataclass
class Steps:
    """The engine's steps as they happen: who took part, and how many there were."""

    seconds: float = 0.0
    plans: list[list[str]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)  # the next steps raise these
    gate: threading.Event = field(default_factory=threading.Event)  # steps wait while it is clear

    def wait_for(self, count: int) -> None:
        """Until so many steps have begun."""
        deadline = time.monotonic() + 30
        while len(self.plans) < count:
            assert time.monotonic() < deadline
            time.sleep(0.002)


@contextmanager
def steps_of(server: Running, seconds: float = 0.0) -> Iterator[Steps]:
    """Watch every step, and make each take `seconds` longer."""
    runner = server.service.engine.engine.runner
    execute, steps = runner.execute, Steps(seconds)
    steps.gate.set()

    def slowly(plan: StepPlan) -> StepResult:
        steps.plans.append([entry.seq.request.request_id for entry in plan.sequences])
        assert steps.gate.wait(30)
        time.sleep(steps.seconds)
        if steps.failures:
            raise steps.failures.pop(0)
        return execute(plan)

    runner.execute = slowly  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        steps.gate.set()
        del runner.execute


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def raw_request(server_url: str, path: str, body: dict[str, Any], *, buffer: int | None = None) -> socket.socket:
    """A request sent over a socket that nobody reads from yet."""
    url = httpx.URL(server_url)
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(30)
    connection.connect((url.host, url.port or 80))
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


@contextmanager
def process(*options: str, before: str = "") -> Iterator[ServerProcess]:
    """`isologit serve` as a process on a free port. before: Python code that runs in it first."""
    code = f"{before}\nfrom isologit.cli import main\nmain()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--threads", "1"]
    with server_process([*command, "--served-model-name", NAME, *options], stop_s=5) as server:
        yield server
