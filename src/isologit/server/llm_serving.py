"""The contest's llm-serving API: its endpoints, defaults, clamps, error texts and streams.

Booleans may be the strings "True" and "False"; unknown parameters are ignored. Streams are bare JSON lines, as the
contest's client reads them, or standard events for a client that accepts `text/event-stream`. No line is ever sent
that is not part of an answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from isologit.engine.request import GenerationRequest, SamplingParams
from isologit.errors import RequestError
from isologit.server.engine_thread import EngineFailedError
from isologit.server.service import Service, Token

_EVENT_STREAM = "text/event-stream"
_RETRY_MS = 30000
_OUT_OF_RANGE = ("Error202: prompt out of range", "prompt_out_of_range")
_EMPTY = ("Error203: prompt token empty", "prompt_token_ids_empty")
_FAILED = ("error304: generation task stop abnormally!, please retry!", "predict_failed")
_MOST_TOP_K = 100
_REASONS = {"stop": "eos"}  # ours: theirs


class Parameters(BaseModel):
    """What a client may ask for; None takes the default."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=False)

    do_sample: bool | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = Field(default=None, gt=0)
    return_full_text: bool | None = True
    return_protocol: str | None = "sse"
    seed: int | None = Field(default=None, ge=0)
    stop: list[str] | None = None


class ClientRequest(BaseModel):
    """The body of every POST."""

    model_config = ConfigDict(extra="ignore")

    inputs: str
    parameters: Parameters | None = None
    stream: bool = False


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["llm-serving"])

    @routes.post("/models/{model}/generate")
    async def generate(model: str, body: ClientRequest, http: Request) -> Response:
        return await _whole(service, model, body, http)

    @routes.post("/models/{model}/generate_stream")
    async def generate_stream(model: str, body: ClientRequest, http: Request) -> Response:
        return _streamed(service, model, body, http)

    @routes.post("/models/{model}")
    async def either(model: str, body: ClientRequest, http: Request) -> Response:
        return _streamed(service, model, body, http) if body.stream else await _whole(service, model, body, http)

    @routes.get("/serving/get_bs")
    async def get_bs() -> Response:
        return _event(service.engine.engine.scheduler.config.max_num_seqs)

    @routes.get("/serving/get_request_numbers")
    async def get_request_numbers() -> Response:
        return _event(service.engine.num_waiting)

    @routes.get("/serving/get_serverd_model_info")
    async def get_serverd_model_info() -> Response:
        slots, length = service.engine.engine.scheduler.config.max_num_seqs, service.limits.max_model_len
        return _event(
            {
                "docker_label": None,
                "max_batch_total_tokens": slots * length,
                "max_concurrent_requests": service.engine.num_waiting,
                "max_input_length": length,
                "max_total_tokens": slots if service.strict_contest else length,
                "model_device_type": "CPU",
                "model_dtype": service.config.dtype,
                "model_id": service.names[0],
                "model_pipeline_tag": "text-generation",
                "version": "2.3",
            }
        )

    return routes


def _event(data: Any) -> Response:
    line = json.dumps({"event": "message", "retry": _RETRY_MS, "data": data})
    return Response(f"data: {line}\n\n", media_type=_EVENT_STREAM)


def _request(service: Service, model: str, body: ClientRequest) -> GenerationRequest | tuple[str, str]:
    """A request that can run, or the text and reason of its refusal. Raises RequestError for an unknown model."""
    if model not in service.names:
        raise RequestError(f"there is no model {model!r}; this server has {', '.join(service.names)}")
    params = sampling_params(body.parameters or Parameters(), service.config.vocab_size, service.strict_contest)
    ids = service.tokenizer.encode(body.inputs)
    if (not body.inputs and not service.strict_contest) or service.config.pad_token_id in ids:
        return _EMPTY
    if len(ids) + params.max_tokens >= service.limits.max_model_len:
        return _OUT_OF_RANGE
    return service.request(ids, params)


def sampling_params(asked: Parameters, vocab_size: int, strict: bool) -> SamplingParams:
    """Defaults and clamps of the contest's server. strict: sample unless told otherwise, apply no penalty or stop."""
    temperature = 1.0 if asked.temperature is None else asked.temperature
    sample = strict if asked.do_sample is None else asked.do_sample
    if not 1e-5 < temperature <= 65536:
        temperature, sample = 1.0, False
    top_k = 3 if asked.top_k is None else asked.top_k
    top_p = 1.0 if asked.top_p is None else asked.top_p
    return SamplingParams(
        max_tokens=300 if asked.max_new_tokens is None else asked.max_new_tokens,
        temperature=temperature if sample else 0.0,
        top_k=min(top_k, _MOST_TOP_K) if 0 < top_k < vocab_size else 1,
        top_p=0.01 if not top_p >= 0.01 else min(top_p, 1.0),
        repetition_penalty=1.0 if strict or asked.repetition_penalty is None else asked.repetition_penalty,
        seed=None if strict else asked.seed,
        stop=() if strict else tuple(stop for stop in asked.stop or () if stop),
        logprobs=0,
    )


def _token(token: Token) -> dict[str, Any]:
    logprob = token.logprobs[token.id] if token.logprobs else 0.0
    return {"id": token.id, "logprob": logprob, "special": token.text == "", "text": token.text}


def _answer(text: str, reason: str, tokens: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    first = tokens[:1] or [{"id": 0, "logprob": 0.0, "special": False, "text": text}]
    return {
        "details": None,
        "generated_text": text,
        "finish_reason": reason,
        "generated_tokens": len(tokens),
        "prefill": first,
        "seed": seed,
        "tokens": tokens or first,
        "top_tokens": [first],
    }


async def _whole(service: Service, model: str, body: ClientRequest, http: Request) -> Response:
    request = _request(service, model, body)
    if isinstance(request, tuple):
        return JSONResponse(_answer(*request, [], 0))
    service.check_capacity()
    try:
        found, output = await service.collect(http, request)
    except EngineFailedError:
        return JSONResponse(_answer(*_FAILED, [], 0))
    text = output.text
    if service.strict_contest:
        found, text = _without_last(found, output.finish_reason)
    reason = _REASONS.get(output.finish_reason, output.finish_reason)
    return JSONResponse(_answer(text, reason, [_token(token) for token in found], request.params.seed or 0))


def _without_last(tokens: list[Token], reason: str) -> tuple[list[Token], str]:
    """What the contest's server sends of an answer that ended by length: the last token without its text."""
    if reason == "length" and tokens:
        tokens = [*tokens[:-1], Token(tokens[-1].id, "", tokens[-1].logprobs)]
    return tokens, "".join(token.text for token in tokens)


def _streamed(service: Service, model: str, body: ClientRequest, http: Request) -> Response:
    request = _request(service, model, body)
    if not isinstance(request, tuple):
        service.check_capacity()
    asked = body.parameters or Parameters()
    if asked.return_protocol not in (None, "sse"):
        wrap = "data:{}\n"
        enclose = False
    else:
        wrap = "data: {}\n\n" if _EVENT_STREAM in http.headers.get("accept", "") else "{}\n"
        enclose = True
    lines = _lines(service, request, full=asked.return_full_text is not False)

    async def encoded() -> AsyncIterator[str]:
        async for inner in lines:
            line = {"event": "message", "retry": _RETRY_MS, "data": [inner]} if enclose else inner
            yield wrap.format(json.dumps(line, ensure_ascii=False))

    return StreamingResponse(encoded(), media_type=_EVENT_STREAM)


async def _lines(
    service: Service, request: GenerationRequest | tuple[str, str], *, full: bool
) -> AsyncIterator[dict[str, Any]]:
    """The inner object of every line: one a token, then the whole answer."""
    if isinstance(request, tuple):
        yield _answer(*request, [], 0)
        return
    tokens: list[Token] = []
    try:
        async for piece in service.stream(request):
            new = list(piece.tokens)
            reason = piece.output.finish_reason if piece.output is not None else ""
            if service.strict_contest:
                new, _ = _without_last(new, reason)
            tokens += new
            for token in new:
                shown = _token(token)
                yield {"details": None, "generated_text": token.text, "tokens": shown, "top_tokens": [shown]}
            if piece.output is not None and full:
                text = "".join(token.text for token in tokens)
                shown_tokens = [_token(token) for token in tokens]
                yield _answer(text, _REASONS.get(reason, reason), shown_tokens, request.params.seed or 0)
    except EngineFailedError:
        yield _answer(*_FAILED, [], 0)
