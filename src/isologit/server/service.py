"""What every dialect needs: limits, requests from prompts, text from tokens, and answers that end with the client.

Knows neither a dialect's fields nor its errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from isologit.config import ModelConfig
from isologit.engine.request import GenerationRequest, RequestOutput, SamplingParams
from isologit.errors import RequestError
from isologit.model.detokenizer import Detokenizer
from isologit.model.tokenizer import Tokenizer
from isologit.server.engine_thread import AsyncEngine, EngineFailedError, QueueFullError
from isologit.server.metrics import ServerMetrics

T = TypeVar("T")


class RequestTimeoutError(EngineFailedError):
    """A request took longer than the server allows."""


class UnknownModelError(RequestError):
    """The server has no model of that name."""


class ClientGoneError(Exception):
    """Nobody is there to be answered."""


@dataclass(frozen=True)
class Limits:
    """max_model_len: prompt and answer of one request, in tokens. request_timeout_s: None waits for ever."""

    max_model_len: int
    max_queue: int = 4096
    max_body_bytes: int = 4 << 20
    request_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One output token; `text` is what it made certain, often nothing."""

    id: int
    text: str
    logprobs: dict[int, float] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step brought a request; `output` and the true text come with the last."""

    tokens: Sequence[Token]
    output: RequestOutput | None = None

    @property
    def text(self) -> str:
        """The text of all its tokens."""
        return "".join(token.text for token in self.tokens)


@dataclass
class Service:
    """The engine as the dialects see it. `names`: model names that are answered to, the first is reported."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    config: ModelConfig
    names: Sequence[str]
    limits: Limits
    metrics: ServerMetrics
    strict_contest: bool = False
    api_key: str | None = None
    draining: bool = field(default=False)

    def request(self, prompt: str | Sequence[int], params: SamplingParams) -> GenerationRequest:
        """A request that can run. Raises RequestError naming the limit it exceeds."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids or prompt == "":
            raise RequestError("the prompt is empty; give at least one token")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise RequestError(f"a prompt token id is outside 0..{self.config.vocab_size - 1}")
        if len(ids) + params.max_tokens > self.limits.max_model_len:
            raise RequestError(
                f"{len(ids)} prompt tokens and {params.max_tokens} new ones exceed the limit of "
                f"{self.limits.max_model_len}; shorten the prompt or ask for fewer tokens"
            )
        return GenerationRequest(self.engine.new_id(), ids, params, prompt if isinstance(prompt, str) else None)

    def check_model(self, name: str) -> None:
        """Raises UnknownModelError, naming what there is, for a model this server does not have."""
        if name not in self.names:
            raise UnknownModelError(f"the model {name!r} does not exist; this server has {', '.join(self.names)}")

    def check_capacity(self, count: int = 1) -> None:
        """Raises QueueFullError or EngineFailedError when so many more requests cannot be taken now."""
        if self.engine.failed is not None:
            raise EngineFailedError(self.engine.failed)
        if self.engine.num_waiting + count > self.limits.max_queue:
            raise QueueFullError(f"the queue of {self.limits.max_queue} requests is full; try again later")

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Piece]:
        """The answer as it grows; closing it cancels the request.

        Raises EngineFailedError when the step failed, RequestTimeoutError when it takes too long.
        """
        feed = _TextFeed(self.tokenizer, request.params.stop)
        watch = self.metrics.watch(len(request.prompt_token_ids))
        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                async for delta in self.engine.generate(request):
                    if delta.error is not None:
                        raise EngineFailedError(delta.error)
                    if delta.token_ids:
                        watch.tokens(len(delta.token_ids))
                    if delta.output is not None and request.params.stop:
                        texts = [""] * len(delta.token_ids)  # NOTE: the last tokens' text may reach past the stop
                    else:
                        texts = [feed.push(token_id) for token_id in delta.token_ids]
                    if delta.output is not None:
                        if texts:
                            texts[-1] += feed.rest(delta.output.text)
                        watch.finished(delta.output.finish_reason)
                    logprobs: Sequence[dict[int, float] | None] = delta.logprobs or [None] * len(texts)
                    tokens = [Token(*parts) for parts in zip(delta.token_ids, texts, logprobs, strict=True)]
                    yield Piece(tokens, delta.output)
        except TimeoutError:
            raise RequestTimeoutError(f"the request took longer than {self.limits.request_timeout_s:g} s") from None
        finally:
            watch.close()

    async def collect(self, http: Request, request: GenerationRequest) -> tuple[list[Token], RequestOutput]:
        """The whole answer. Raises ClientGoneError, having cancelled the request, when the client leaves."""

        async def gather() -> tuple[list[Token], RequestOutput]:
            tokens: list[Token] = []
            async for piece in self.stream(request):
                tokens += piece.tokens
                if piece.output is not None:
                    return tokens, piece.output
            raise EngineFailedError("the answer ended early")

        return await unless_gone(http, gather())


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects first."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnect(http: Request) -> None:
    message: Any = None
    while message != "http.disconnect":
        message = (await http.receive())["type"]


class _TextFeed:
    """Text that is certain. With stop strings, what may be the beginning of one is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._hold = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""
        self._given = 0  # characters

    def push(self, token_id: int) -> str:
        self._held += self._detokenizer.push(token_id)
        return self._give(len(self._held) - self._hold)

    def rest(self, whole: str) -> str:
        """What is missing of the whole answer's text."""
        return whole[self._given :]

    def _give(self, count: int) -> str:
        if count <= 0:
            return ""
        given, self._held = self._held[:count], self._held[count:]
        self._given += len(given)
        return given
