"""A server from options to exit code: load, bind, serve, drain. Owns the process's signals while it runs."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType

import uvicorn

from isologit.common.listening import bind, url_of
from isologit.common.progress import Observer, Silent
from isologit.config.engine_options import LogprobsMode
from isologit.engine.async_engine import AsyncEngine
from isologit.errors import ConfigError, ModelError
from isologit.llm import LLM, require_backend
from isologit.server.app import create_app
from isologit.server.commitments import Commitments
from isologit.server.connections import LONGEST_STALL_S, Connection, close_stalled
from isologit.server.metrics import ServerMetrics
from isologit.server.options import ServerOptions
from isologit.server.service import Limits, Service
from isologit.workload import DEMO_NAME

_CONTEST_NAMES = ("llama2", "internlm")  # paths the contest's clients post to
_LAST_WORDS_S = 1.0  # for answers that say why, before a failed server leaves
_POLL_S = 0.05
_LONGEST_GOODBYE_S = 10  # for answers that are complete but not yet taken, when the server leaves
_BACKLOG = 4096
_SWITCH_S = 0.0005  # how long the threads of engine and network keep each other from Python's lock


def make_service(llm: LLM, options: ServerOptions, name: str) -> Service:
    """The engine and its rules. Raises ModelError without a tokenizer or with a chat template that cannot
    be used, ConfigError for a length beyond the model's.
    """
    if llm.tokenizer is None:
        raise ModelError("the model has no tokenizer, and a server needs one; name it with --tokenizer")
    llm.tokenizer.check_chat_template()
    length = llm.max_model_len if options.max_model_len is None else options.max_model_len
    if length > llm.max_model_len:
        raise ConfigError(
            f"--max-model-len (in a contest YAML seq_length and max_generate_length) must be at most the model's "
            f"context of {llm.max_model_len}, not {length}"
        )
    engine = AsyncEngine(llm.open_loop(keep_hidden=options.commit))
    blocks = engine.engine.scheduler.blocks
    length = min(length, blocks.num_blocks * blocks.block_size + 1)  # the last token needs no room
    return Service(
        engine=engine,
        tokenizer=llm.tokenizer,
        config=llm.config,
        names=list(dict.fromkeys([name, *_CONTEST_NAMES])),
        limits=Limits(length, options.max_queue, options.max_body_bytes, options.request_timeout_s),
        metrics=ServerMetrics(name, engine),
        strict_contest=options.strict_contest,
        api_key=options.api_key,
        plain_user_content=options.plain_user_content,
        commitments=Commitments(llm.config.hidden_size) if options.commit else None,
        allowed_origins=options.allowed_origins,
    )


def serve(
    options: ServerOptions,
    *,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    starting: Callable[[], AbstractContextManager[Observer]] = lambda: nullcontext(Silent()),
) -> int:
    """Serve until told to stop; returns the exit code: 0 after draining, 1 when the engine could not go on.

    `starting` gives what is told of loading and warming up, and is left when these are over.

    Raises UserError for what the user must change, before anything is served.
    """
    require_backend(options.engine)
    listener = bind(options.host, options.port)
    model = options.engine.model
    name = options.served_model_name or (DEMO_NAME if model is None else Path(model).name)
    llm = None
    try:
        with starting() as observer:
            observer.stage("loading the model")
            mode: LogprobsMode = "raw_logits" if options.strict_contest else "raw_logprobs"
            llm = LLM(options=options.engine, logprobs_mode=mode, on_load_progress=observer.loading)
            service = make_service(llm, options, name)
            observer.stage("warming up")
            llm.warm_up()
        _allow_many_connections()
        sys.setswitchinterval(_SWITCH_S)
        line = f"serving {name} on {url_of(listener)} (llm-serving, OpenAI and TGI; /openapi.json lists everything)"
        Server(service, on_started=lambda: say(line)).run(sockets=[listener])
        return 0 if service.engine.failed is None else 1
    finally:
        if llm is not None:
            llm.close()


def _allow_many_connections() -> None:
    """Raise the limit on open files as far as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Server(uvicorn.Server):
    """uvicorn, but the first signal drains and the second leaves at once."""

    def __init__(self, service: Service, on_started: Callable[[], None] = lambda: None) -> None:
        self._service = service
        self._on_started = on_started
        self._draining: asyncio.Task[None] | None = None
        app = create_app(service, on_failure=self._failed)
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_level="warning",
                access_log=False,
                backlog=_BACKLOG,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=_LONGEST_GOODBYE_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        for listener in sockets or ():
            close_stalled(listener, LONGEST_STALL_S)
        await super().startup(sockets)
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: answer what was taken, refuse what is new, then leave. Second: leave."""
        if self._service.draining:
            os._exit(130)
        self._service.draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        while self._service.engine.num_unfinished:
            await asyncio.sleep(_POLL_S)
        self.should_exit = True

    def _failed(self) -> None:
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._leave)

    def _leave(self) -> None:
        self.should_exit = self.force_exit = True
