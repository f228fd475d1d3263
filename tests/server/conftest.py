"""A real server on a port of its own, in a thread of the test's process, so that its inside can be looked at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest

from isologit import LLM
from isologit.common.listening import bind
from isologit.server.options import ServerOptions
from isologit.server.run import Server, make_service
from isologit.server.service import Service

NAME = "demo"


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    service: Service
    llm: LLM
    uvicorn: Server

    def wait_idle(self) -> None:
        """Until nothing runs; then every slot and block must be back."""
        deadline = time.monotonic() + 30
        scheduler = self.service.engine.engine.scheduler
        while self.service.engine.num_unfinished or scheduler.num_running or scheduler.num_waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        scheduler.check_integrity()
        assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


@contextmanager
def running(options: ServerOptions | None = None) -> Iterator[Running]:
    options = options or ServerOptions()
    llm = LLM(
        options=options.engine,
        num_threads=1,
        logprobs_mode="raw_logits" if options.strict_contest else "raw_logprobs",
    )
    service = make_service(llm, options, NAME)
    server = Server(service)
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, llm, server)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        llm.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Servers with options of their own."""
    open_ones = []

    def begin(**options: object) -> Running:
        context = running(ServerOptions(**options))  # type: ignore[arg-type]
        open_ones.append(context)
        return context.__enter__()

    yield begin
    for context in open_ones:
        context.__exit__(None, None, None)
