"""A server from options to exit code: load, bind, serve, drain. Owns the process's signals while it runs."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from isologit.engine.async_engine import AsyncEngine
from isologit.errors import ConfigError, ModelError
from isologit.llm import LLM
from isologit.server.app import create_app
from isologit.server.connections import LONGEST_STALL_S, Connection, close_stalled
from isologit.server.metrics import ServerMetrics
from isologit.server.service import Limits, Service

_CONTEST_NAMES = ("llama2", "internlm")  # paths the contest's clients post to
_LAST_WORDS_S = 1.0  # for answers that say why, before a failed server leaves
_POLL_S = 0.05
_LONGEST_GOODBYE_S = 10  # for answers that are complete but not yet taken, when the server leaves
_BACKLOG = 4096
_SWITCH_S = 0.0005  # how long the threads of engine and network keep each other from Python's lock


@dataclass(frozen=True)
class ServerOptions:
    """What `isologit serve` can be told.

    model: None is the built-in demo model. model_config: a config to use instead of the one beside the weights. port: 0
    takes any free one.
    """

    model: str | None = None
    model_config: Path | None = None
    tokenizer: Path | None = None
    load_format: str = "auto"
    qkv_layout: str | None = None
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8835
    api_key: str | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    num_speculative_tokens: int = 0
    draft_model: str | None = None
    enable_prefix_caching: bool = True
    num_threads: int | None = None
    seed: int = 0
    max_queue: int = 4096
    max_body_bytes: int = 4 << 20
    request_timeout_s: float | None = None
    strict_contest: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for limits that no model could make sense of."""
        for option, value in (("--max-queue", self.max_queue), ("--max-body-bytes", self.max_body_bytes)):
            if value < 1:
                raise ConfigError(f"{option} must be at least 1, not {value}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(
                f"--max-model-len (in a contest YAML seq_length and max_generate_length) must be at least 2, not "
                f"{self.max_model_len}"
            )
        if self.request_timeout_s is not None and not self.request_timeout_s > 0:
            raise ConfigError(f"--request-timeout must be above 0, not {self.request_timeout_s}")
        if self.api_key == "":
            raise ConfigError("the API key is empty; give one, or leave it out")


def make_service(llm: LLM, options: ServerOptions, name: str) -> Service:
    """The engine and its rules. Raises ModelError without a tokenizer, ConfigError for a length beyond the model's."""
    if llm.tokenizer is None:
        raise ModelError("the model has no tokenizer, and a server needs one; name it with --tokenizer")
    length = llm.max_model_len if options.max_model_len is None else options.max_model_len
    if length > llm.max_model_len:
        raise ConfigError(
            f"--max-model-len (in a contest YAML seq_length and max_generate_length) must be at most the model's "
            f"context of {llm.max_model_len}, not {length}"
        )
    engine = AsyncEngine(llm.open_loop())
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
    )


def serve(options: ServerOptions, *, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> int:
    """Serve until told to stop; returns the exit code: 0 after draining, 1 when the engine could not go on.

    Raises UserError for what the user must change, before anything is served.
    """
    from isologit.workload import demo_model_path

    listener = bind(options.host, options.port)
    name = options.served_model_name or (Path(options.model).name if options.model else "isologit-demo")
    say("loading the model ...")
    llm = LLM(
        demo_model_path() if options.model is None else options.model,
        config=options.model_config,
        tokenizer=options.tokenizer,
        load_format=options.load_format,
        qkv_layout=options.qkv_layout,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        enable_prefix_caching=options.enable_prefix_caching,
        speculative_config=(
            {"num_speculative_tokens": options.num_speculative_tokens, "model": options.draft_model}
            if options.num_speculative_tokens
            else None
        ),
        num_threads=options.num_threads,
        seed=options.seed,
        logprobs_mode="raw_logits" if options.strict_contest else "raw_logprobs",
    )
    try:
        service = make_service(llm, options, name)
        say("warming up ...")
        llm.warm_up()
        _allow_many_connections()
        sys.setswitchinterval(_SWITCH_S)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        line = f"serving {name} on http://{shown}:{port} (llm-serving, OpenAI and TGI; /openapi.json lists everything)"
        Server(service, on_started=lambda: say(line)).run(sockets=[listener])
        return 0 if service.engine.failed is None else 1
    finally:
        llm.close()


def _allow_many_connections() -> None:
    """Raise the limit on open files as far as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def bind(host: str, port: int) -> socket.socket:
    """A socket to listen on; port 0 takes a free one. Raises ConfigError when the address cannot be had."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be between 0 and 65535, not {port}")
    try:
        families = [found[0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        family = socket.AF_INET if socket.AF_INET in families else families[0]  # of "localhost", what clients try
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        close_stalled(listener, LONGEST_STALL_S)
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        ) from None
    return listener


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
