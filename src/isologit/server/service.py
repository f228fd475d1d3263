"""What every dialect needs: limits, requests from prompts, text from tokens, and answers that end with the client.

Knows neither a dialect's fields nor its errors.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from starlette.types import Receive

from isologit.config import ModelConfig
from isologit.engine.async_engine import AsyncEngine, Delta, EngineFailedError
from isologit.engine.request import GenerationRequest, RequestOutput, SamplingParams
from isologit.errors import IsologitError, RequestError
from isologit.server.commitments import Commitments
from isologit.server.fields import FieldError
from isologit.server.metrics import ServerMetrics
from isologit.text.tokenizer import Tokenizer

ALIASES = ("tgi", "dummy")  # what clients of one model send when they must send something
_LARGEST_TEXTS = 16384  # characters of all stop strings of a request, or of all bad words
_LONG_TEXT = 4096  # characters; what is longer is made into tokens on another thread


class RequestTimeoutError(EngineFailedError):
    """A request took longer than the server allows."""


class UnknownModelError(RequestError):
    """The server has no model of that name."""


class QueueFullError(IsologitError):
    """More requests are waiting than the server holds."""


class ShuttingDownError(IsologitError):
    """The server takes nothing new."""


@dataclass(frozen=True)
class Limits:
    """max_model_len: prompt and answer of one request, in tokens. request_timeout_s: None waits for ever."""

    max_model_len: int
    max_queue: int = 4096
    max_body_bytes: int = 4 << 20
    request_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One output token; `text` is what it made certain, often nothing.

    shown: what may be shown since: the text, held back while it may begin a stop string.
    """

    id: int
    text: str
    shown: str
    logprobs: dict[int, float] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step brought a request; `output` comes with the last. commit: of each token, in a judge's round."""

    tokens: Sequence[Token]
    output: RequestOutput | None = None
    commit: Sequence[dict[str, str]] | None = None

    @property
    def text(self) -> str:
        """What may be shown now."""
        return "".join(token.shown for token in self.tokens)


@dataclass
class Service:
    """The engine as the dialects see it.

    names: what the model is called, the first of them in answers. plain_user_content: text of a conversation never
    becomes control tokens. allowed_origins: of pages that may call from a browser; "*" is all.
    """

    engine: AsyncEngine
    tokenizer: Tokenizer
    config: ModelConfig
    names: Sequence[str]
    limits: Limits
    metrics: ServerMetrics
    strict_contest: bool = False
    api_key: str | None = None
    plain_user_content: bool = False
    commitments: Commitments | None = None
    allowed_origins: Sequence[str] = ()
    draining: bool = field(default=False)
    _num_rendering: int = field(default=0, init=False)
    _renderer: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "isologit-chat"), init=False, repr=False
    )

    async def prompt_ids(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises RequestError for an empty text."""
        ids = (
            await self.encode(prompt, add_special_tokens=add_special_tokens)
            if isinstance(prompt, str)
            else list(prompt)
        )
        if prompt == "":
            raise RequestError("the prompt is empty; give at least one token")
        return ids

    def request(self, ids: list[int], params: SamplingParams, *, is_echoed: bool = False) -> GenerationRequest:
        """A request that can run. is_echoed: its prompt is told before its answer.

        Raises RequestError naming the limit it exceeds, or what it cannot be given.
        """
        for name, texts in (("stop", params.stop), ("bad_words", params.bad_words)):
            if sum(map(len, texts)) > _LARGEST_TEXTS:
                raise FieldError(name, f"{name} is longer than {_LARGEST_TEXTS} characters; send fewer or shorter ones")
        for word in params.bad_words:
            self.tokenizer.encode_without_bos(word)  # raises for what is not Unicode
        replace(self.engine.limits, max_model_len=self.limits.max_model_len).check(ids, params)
        return GenerationRequest(self.engine.new_id(), ids, params, is_continued=is_echoed)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModelError, naming what there is, for a model this server does not have."""
        if name is not None and name not in self.names and name not in ALIASES:
            raise UnknownModelError(f"the model {name!r} does not exist; this server has {', '.join(self.names)}")

    def check_capacity(self, count: int) -> None:
        """Raises unless so many more requests can be taken now.

        RequestError when they never can, ShuttingDownError, EngineFailedError, or QueueFullError.
        """
        if self.draining:
            raise ShuttingDownError("the server is shutting down")
        if self.engine.failed is not None:
            raise EngineFailedError(self.engine.failed)
        most = self.engine.max_num_seqs + self.limits.max_queue
        if count > most:
            raise RequestError(f"{count} answers at once exceed the limit of {most}; ask for fewer")
        if self.engine.num_unfinished + count > most:
            raise self._queue_full()

    def _queue_full(self) -> QueueFullError:
        return QueueFullError(f"the queue of {self.limits.max_queue} requests is full; try again later")

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, without holding up other answers; `add_special_tokens`: with the begin token.

        Raises RequestError for text that is not Unicode.
        """
        encode = self.tokenizer.encode if add_special_tokens else self.tokenizer.encode_without_bos
        return encode(text) if len(text) < _LONG_TEXT else await asyncio.to_thread(encode, text)

    async def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], *, add_special_tokens: bool = False, **template: Any
    ) -> list[int]:
        """Token ids of a conversation; the model's template runs beside the event loop, one conversation at a time.

        template: keywords of `Tokenizer.apply_chat_template`. Raises ModelError and RequestError as
        `Tokenizer.encode_chat`, and QueueFullError when too many conversations wait.
        """
        if self._num_rendering > self.limits.max_queue:
            raise self._queue_full()
        render = partial(self.tokenizer.encode_chat, messages, plain_content=self.plain_user_content, **template)
        self._num_rendering += 1
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self._renderer, render)
        finally:
            self._num_rendering -= 1
        return [*self.tokenizer.encode(""), *ids] if add_special_tokens else ids

    def text_with_special_tokens(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens by the names that the vocabulary gives them."""
        tokenizer, text = self.tokenizer, ""
        for is_text, group in itertools.groupby(ids, tokenizer.is_text):
            if not is_text:
                text += "".join(map(tokenizer.token_name, group))
            elif text:
                text += tokenizer.inner_text(list(group))
            else:
                text = tokenizer.decode(group)
        return text

    def answer(
        self, requests: Sequence[GenerationRequest], *, whole: bool = False, client_id: str | None = None
    ) -> Answer:
        """Begin to answer; must be closed. whole: the answer is wanted at once, not as it grows.

        client_id: what the client calls the request, which commitments are made for.

        Raises as `check_capacity`.
        """
        self.check_capacity(len(requests))
        return Answer(self, requests, whole=whole, client_id=client_id)

    async def collect(
        self, receive: Receive, requests: Sequence[GenerationRequest]
    ) -> list[tuple[list[Token], RequestOutput]]:
        """The whole answers, in the order of the requests.

        Raises as `answer` and `Answer.steps`; ClientGoneError when the client leaves, which cancels everything.
        """
        answer = self.answer(requests, whole=True)
        with answer.ends_with_client(receive):
            tokens: list[list[Token]] = [[] for _ in requests]
            outputs: dict[int, RequestOutput] = {}
            async for step in answer.steps():
                for index, piece in step:
                    tokens[index] += piece.tokens
                    if piece.output is not None:
                        outputs[index] = piece.output
        return [(tokens[index], outputs[index]) for index in range(len(requests))]


class Answer:
    """Requests that are being answered together: their text as it grows, and their end."""

    def __init__(
        self, service: Service, requests: Sequence[GenerationRequest], *, whole: bool, client_id: str | None = None
    ) -> None:
        self._commitments = service.commitments if client_id is not None else None
        names = [client_id] if len(requests) == 1 else [f"{client_id}-{index}" for index in range(len(requests))]
        self._names = [name or "" for name in names]
        self._committed = [0] * len(requests)
        self._watches = [service.metrics.watch(len(request.prompt_token_ids)) for request in requests]
        self._stream = service.engine.submit(
            requests, lambda index, delta: self._watches[index].observe(delta), whole=whole
        )
        self._timer: asyncio.TimerHandle | None = None
        limit_s = service.limits.request_timeout_s
        if limit_s is not None:
            error = RequestTimeoutError(f"the request took longer than the limit of {limit_s:g} s")
            self._timer = asyncio.get_running_loop().call_later(limit_s, self._stream.fail, error)

    async def steps(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """What was gained since the last time, as (index of the request, piece), each index at most once.

        Raises EngineFailedError when a step failed, RequestTimeoutError when it takes too long, ClientGoneError after
        `close`.
        """
        while taken := await self._stream.take():
            pieces: dict[int, Piece] = {}
            for index, delta in taken:
                piece, before = self._piece(index, delta), pieces.get(index)
                if before is not None:
                    commit = None if before.commit is None else [*before.commit, *(piece.commit or ())]
                    piece = Piece([*before.tokens, *piece.tokens], piece.output, commit)
                pieces[index] = piece
            yield list(pieces.items())

    def _piece(self, index: int, delta: Delta) -> Piece:
        logprobs: Sequence[dict[int, float] | None] = delta.logprobs or [None] * len(delta.token_ids)
        parts = zip(delta.token_ids, delta.texts, delta.shown, logprobs, strict=True)
        commit = None
        if self._commitments is not None and delta.hidden is not None:
            commit = self._commitments.commit(self._names[index], self._committed[index], delta.hidden)
            self._committed[index] += len(delta.token_ids)
        return Piece([Token(*part) for part in parts], delta.output, commit)

    def close(self) -> None:
        """Cancel what is not over yet."""
        self._stream.close()
        if self._timer is not None:
            self._timer.cancel()
        for watch in self._watches:
            watch.close()

    @contextmanager
    def ends_with_client(self, receive: Receive) -> Iterator[None]:
        """Closes the answer when the block is left, or as soon as the client disconnects."""
        gone = asyncio.ensure_future(_disconnect(receive))
        gone.add_done_callback(lambda _: self.close())
        try:
            yield
        finally:
            gone.cancel()
            self.close()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
