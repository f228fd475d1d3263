"""OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions, whole and streamed.

Fields that would change an answer and are not implemented are refused, never ignored. Extensions carry vLLM's names.
Streams are ASCII: some clients also split lines at U+2028.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from isologit.engine.async_engine import EngineFailedError
from isologit.engine.request import GenerationRequest, SamplingParams
from isologit.errors import RequestError
from isologit.server.fields import ListOf
from isologit.server.responses import StreamedAnswer
from isologit.server.service import Answer, RequestTimeoutError, Service, Token

_DONE = "data: [DONE]\n\n"
_MOST_CHOICES = 128
_DEFAULT_TOKENS = 16


class StreamOptions(BaseModel):
    """What a stream also tells."""

    include_usage: bool = False


class _Common(BaseModel):
    """Fields of both kinds of request."""

    model_config = ConfigDict(extra="ignore")

    model: str
    temperature: float | None = Field(default=None, ge=0, le=1e4)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=_MOST_CHOICES)
    seed: int | None = Field(default=None, ge=0)
    stop: str | ListOf[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    top_k: int | None = Field(default=None, ge=-1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    min_tokens: int = Field(default=0, ge=0)
    stop_token_ids: ListOf[int] = Field(default_factory=list)
    ignore_eos: bool = False

    def refuse_unsupported(self) -> None:
        """Raises RequestError for fields that would have to change the answer."""
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise RequestError(f"{name} is not supported; leave it out")

    def sampling_params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """The engine's form; OpenAI samples at temperature 1 unless told otherwise."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=self.seed,
            stop=tuple(stop for stop in stops if stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
        )


class CompletionRequest(_Common):
    """The body of /v1/completions."""

    prompt: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt. Raises RequestError when there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RequestError("prompt is an empty list; give at least one prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Message(BaseModel):
    """One message of a conversation; content may be parts of text."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | ListOf[dict[str, Any]] | None = None

    def flat(self) -> dict[str, Any]:
        """With its parts joined. Raises RequestError for parts that are not text."""
        content = self.content or ""
        if not isinstance(content, str):
            if any(not isinstance(part.get("text"), str) for part in content):
                raise RequestError("only parts of type text are supported in a message's content")
            content = "".join(part["text"] for part in content)
        return {**self.model_dump(), "content": content}


class ChatRequest(_Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[ListOf[Message], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None


@dataclass
class _Style:
    """How completions and chat differ: names, and the shape of a choice whole and in part.

    Both shapes take the text, its tokens and how many most likely tokens to show beside each (None: no logprobs).
    """

    prefix: str
    whole_object: str
    part_object: str
    whole: Callable[[str, list[Token], int | None], dict[str, Any]]
    part: Callable[[str, Sequence[Token], int | None, int], dict[str, Any]]
    first: dict[str, Any] | None = None  # what the first part of a choice says


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["openai"], prefix="/v1")

    def check(asked: _Common) -> None:
        service.check_model(asked.model)
        asked.refuse_unsupported()

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name) for name in service.names]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service, name)

    @routes.post("/completions")
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        check(asked)
        if asked.echo or asked.suffix or (asked.best_of or 1) > (asked.n or 1):
            raise RequestError("echo, suffix and best_of above n are not supported; leave them out")
        params = asked.sampling_params(asked.max_tokens or _DEFAULT_TOKENS, asked.logprobs)
        return await _answer(service, http, asked, asked.prompts(), params, _completion_style(service))

    @routes.post("/chat/completions")
    async def chat(asked: ChatRequest, http: Request) -> Response:
        check(asked)
        if asked.tools or (asked.response_format or {}).get("type", "text") != "text":
            raise RequestError("tools and response_format are not supported; leave them out")
        text = service.tokenizer.apply_chat_template([message.flat() for message in asked.messages])
        ids = await service.encode_without_bos(text)
        room = service.limits.max_model_len - len(ids)
        max_tokens = asked.max_completion_tokens or asked.max_tokens or max(1, room)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        return await _answer(
            service, http, asked, [ids], asked.sampling_params(max_tokens, logprobs), _chat_style(service)
        )

    return routes


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "isologit",
        "max_model_len": service.limits.max_model_len,
    }


async def _answer(
    service: Service,
    http: Request,
    asked: _Common,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams,
    style: _Style,
) -> Response:
    count = asked.n or 1
    service.check_capacity(len(prompts) * count)
    requests = []
    for prompt in prompts:
        ids = await service.prompt_ids(prompt)
        for number in range(count):
            seed = None if params.seed is None else params.seed + number
            requests.append(service.request(ids, replace(params, seed=seed)))
    head = {"id": f"{style.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        answer = service.answer(requests)
        return StreamedAnswer(answer, _events(answer, requests, count, head, style, params.logprobs, usage))
    found = await service.collect(http.receive, requests)
    choices = [
        {
            "index": i,
            **style.whole(output.text, tokens, params.logprobs),
            "finish_reason": output.finish_reason,
        }
        for i, (tokens, output) in enumerate(found)
    ]
    usage_of = _usage(requests, count, sum(len(output.token_ids) for _, output in found))
    return JSONResponse({**head, "object": style.whole_object, "choices": choices, "usage": usage_of})


def _usage(requests: Sequence[GenerationRequest], count: int, output_tokens: int) -> dict[str, int]:
    """Prompt tokens count once, however many answers they get."""
    prompt_tokens = sum(len(request.prompt_token_ids) for request in requests[::count])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }


async def _events(
    answer: Answer,
    requests: Sequence[GenerationRequest],
    count: int,
    head: dict[str, Any],
    style: _Style,
    logprobs: int | None,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Events: one for what a step brought a choice, then the usage, then [DONE]."""
    head = {**head, "object": style.part_object}
    if include_usage:
        head["usage"] = None

    def event(index: int, choice: dict[str, Any], reason: str | None) -> str:
        choices = [{"index": index, **choice, "finish_reason": reason}]
        return f"data: {json.dumps({**head, 'choices': choices})}\n\n"

    output_tokens = 0
    offsets = [0] * len(requests)
    try:
        if style.first is not None:
            yield "".join(event(index, style.first, None) for index in range(len(requests)))
        async for step in answer.steps():
            events = []
            for index, piece in step:
                text = piece.text
                output_tokens += len(piece.tokens)
                reason = None if piece.output is None else piece.output.finish_reason
                if text or reason is not None or logprobs is not None:
                    events.append(event(index, style.part(text, piece.tokens, logprobs, offsets[index]), reason))
                offsets[index] += sum(len(token.text) for token in piece.tokens)
            if events:
                yield "".join(events)
        if include_usage:
            usage = _usage(requests, count, output_tokens)
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
    except EngineFailedError as error:
        code = 504 if isinstance(error, RequestTimeoutError) else 500
        body = {"message": str(error), "type": "internal_error", "param": None, "code": code}
        yield f"data: {json.dumps({'error': body})}\n\n"
    yield _DONE


def _completion_style(service: Service) -> _Style:
    def logprobs_of(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            best = token.logprobs or {}
            shown["tokens"].append(_name(service, token.id))
            shown["token_logprobs"].append(best.get(token.id))
            shown["top_logprobs"].append({_name(service, i): value for i, value in best.items()})
            shown["text_offset"].append(offset)
            offset += len(token.text)
        return shown

    def part(text: str, tokens: Sequence[Token], count: int | None, offset: int) -> dict[str, Any]:
        return {"text": text, "logprobs": None if count is None else logprobs_of(tokens, offset)}

    return _Style(
        "cmpl", "text_completion", "text_completion", lambda text, tokens, count: part(text, tokens, count, 0), part
    )


def _chat_style(service: Service) -> _Style:
    def entry(token_id: int, value: float) -> dict[str, Any]:
        name = _name(service, token_id)
        data = service.tokenizer.token_bytes(token_id) if name else b""
        return {"token": name, "logprob": value, "bytes": list(name.encode() if data is None else data)}

    def logprobs_of(tokens: Sequence[Token], count: int | None) -> dict[str, Any] | None:
        if count is None:
            return None
        shown = []
        for token in tokens:
            known = token.logprobs or {}
            best = sorted(known.items(), key=lambda item: -item[1])[:count]  # the chosen one may not be among them
            others = [entry(i, value) for i, value in best]
            shown.append({**entry(token.id, known.get(token.id, 0.0)), "top_logprobs": others})
        return {"content": shown}

    def whole(text: str, tokens: list[Token], count: int | None) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}, "logprobs": logprobs_of(tokens, count)}

    def part(text: str, tokens: Sequence[Token], count: int | None, offset: int) -> dict[str, Any]:
        return {"delta": {"content": text}, "logprobs": logprobs_of(tokens, count)}

    first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
    return _Style("chatcmpl", "chat.completion", "chat.completion.chunk", whole, part, first)


def _name(service: Service, token_id: int) -> str:
    """A token's text where other text stands before it; special tokens have none."""
    return service.tokenizer.inner_text([token_id])
