"""The contest's llm-serving API: its endpoints, defaults, clamps, error texts and streams.

Booleans may be the strings "True" and "False"; unknown parameters are ignored. Streams are bare JSON lines, as the
contest's client reads them, or standard events for a client that accepts `text/event-stream`. No line is ever sent
that is not part of an answer, and lines are ASCII: clients that split text into lines also split at U+2028 and U+0085.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from isologit import __version__
from isologit.engine.async_engine import EngineFailedError
from isologit.engine.request import GenerationRequest, RequestOutput, SamplingParams
from isologit.server.bodies import json_router
from isologit.server.commitments import REQUEST_ID_HEADER
from isologit.server.fields import CONTEST, Body, Ignored, ListOf
from isologit.server.responses import StreamedAnswer
from isologit.server.service import Answer, RequestTimeoutError, Service, Token

_EVENT_STREAM = "text/event-stream"
_RETRY_MS = 30000
_OUT_OF_RANGE = ("Error202: prompt out of range", "prompt_out_of_range")
_EMPTY = ("Error203: prompt token empty", "prompt_token_ids_empty")
_FAILED = ("error304: generation task stop abnormally!, please retry!", "predict_failed")
_MOST_TOP_K = 100
_THEIR_VERSION = "2.3"


class Parameters(Body):
    """What a client may ask for; None takes the default."""

    do_sample: bool | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    return_full_text: bool | None = True
    return_protocol: str | None = "sse"
    seed: int | None = None
    stop: ListOf[str] | None = None


class ClientRequest(Body):
    """The body of every POST."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool = False


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = json_router(tags=["llm-serving"])

    @routes.post("/models/{model}/generate")
    async def generate(model: str, body: ClientRequest, http: Request) -> Response:
        return await _whole(service, model, body, http)

    @routes.post("/models/{model}/generate_stream")
    async def generate_stream(model: str, body: ClientRequest, http: Request) -> Response:
        return await _streamed(service, model, body, http)

    @routes.post("/models/{model}")
    async def either(model: str, body: ClientRequest, http: Request) -> Response:
        return await (_streamed if body.stream else _whole)(service, model, body, http)

    @routes.get("/serving/get_bs")
    async def get_bs() -> Response:
        return _event(service.engine.engine.scheduler.config.max_num_seqs)

    @routes.get("/serving/get_request_numbers")
    async def get_request_numbers() -> Response:
        return _event(service.engine.num_waiting)

    @routes.get("/serving/get_serverd_model_info")
    async def get_serverd_model_info() -> Response:
        slots, length = service.engine.engine.scheduler.config.max_num_seqs, service.limits.max_model_len
        strict = service.strict_contest
        return _event(
            {
                "docker_label": None,
                "max_batch_total_tokens": slots * length,
                "max_concurrent_requests": service.engine.num_waiting if strict else service.limits.max_queue,
                "max_input_length": length,
                "max_total_tokens": slots if strict else length,
                "model_device_type": "CPU",
                "model_dtype": service.config.dtype,
                "model_id": service.names[0],
                "model_pipeline_tag": "text-generation",
                "version": _THEIR_VERSION if strict else __version__,
            }
        )

    return routes


def _event(data: Any) -> Response:
    line = json.dumps({"event": "message", "retry": _RETRY_MS, "data": data})
    return Response(f"data: {line}\n\n", media_type=_EVENT_STREAM)


async def _request(
    service: Service, model: str, body: ClientRequest, http: Request
) -> GenerationRequest | tuple[str, str]:
    """A request that can run, or the text and reason of its refusal. Raises UnknownModelError."""
    service.check_model(model)
    body.check_others({"model": Ignored("the path names it")}, http)
    if body.parameters is not None:
        body.parameters.check_others(CONTEST, http)
    params = sampling_params(body.parameters or Parameters(), service.config.vocab_size, service.strict_contest)
    service.check_capacity(1)
    ids = await service.encode(body.inputs)
    if (not body.inputs and not service.strict_contest) or service.config.pad_token_id in ids:
        return _EMPTY
    if len(ids) + params.max_tokens >= service.limits.max_model_len:
        return _OUT_OF_RANGE
    return service.request(ids, params)


def sampling_params(asked: Parameters, vocab_size: int, strict: bool) -> SamplingParams:
    """Defaults and clamps of the contest's server. strict: sample unless told otherwise; no penalty, seed or stop.

    Raises RequestError for a seed or a penalty that means nothing.
    """
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
        top_p=top_p if 0 < top_p <= 1 else 1.0 if top_p > 1 else 0.01,
        repetition_penalty=1.0 if strict or asked.repetition_penalty is None else asked.repetition_penalty,
        seed=None if strict else asked.seed,
        stop=() if strict else tuple(stop for stop in asked.stop or () if stop),
        logprobs=0,
    )


def _token(token: Token) -> dict[str, Any]:
    logprob = token.logprobs[token.id] if token.logprobs else 0.0
    return {"id": token.id, "logprob": logprob, "special": token.shown == "", "text": token.shown}


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
    request = await _request(service, model, body, http)
    if isinstance(request, tuple):
        return JSONResponse(_answer(*request, [], 0))
    try:
        [(found, output)] = await service.collect(http.receive, [request])
    except RequestTimeoutError:
        raise
    except EngineFailedError:
        return JSONResponse(_answer(*_FAILED, [], 0))
    text = output.text
    if service.strict_contest:
        found = _without_last_text(found)
        text = "".join(token.shown for token in found)
    return JSONResponse(_answer(text, _reason(output), [_token(token) for token in found], request.params.seed or 0))


def _without_last_text(tokens: list[Token]) -> list[Token]:
    """A finished answer as the contest's server sends it: whatever the last token made certain is lost."""
    return [*tokens[:-1], *(Token(token.id, "", "", token.logprobs) for token in tokens[-1:])]


def _reason(output: RequestOutput) -> str:
    """The contest's word for the end of an answer; stop strings, which its server ignores, end with "stop"."""
    return "eos" if output.finish_reason == "stop" and output.stop_reason is None else output.finish_reason


async def _streamed(service: Service, model: str, body: ClientRequest, http: Request) -> Response:
    asked = body.parameters or Parameters()
    enclosed = asked.return_protocol in (None, "sse")
    if not enclosed:
        wrap = "data:{}\n"
    else:
        wrap = "data: {}\n\n" if _EVENT_STREAM in http.headers.get("accept", "") else "{}\n"

    def line(inner: dict[str, Any]) -> str:
        return wrap.format(json.dumps({"event": "message", "retry": _RETRY_MS, "data": [inner]} if enclosed else inner))

    request = await _request(service, model, body, http)
    if isinstance(request, tuple):
        return Response(line(_answer(*request, [], 0)), media_type=_EVENT_STREAM)
    answer = service.answer([request], client_id=http.headers.get(REQUEST_ID_HEADER))
    full = asked.return_full_text is not False
    lines = _lines(answer, request, line, full=full, strict=service.strict_contest)
    return StreamedAnswer(answer, lines)


async def _lines(
    answer: Answer, request: GenerationRequest, line: Callable[[dict[str, Any]], str], *, full: bool, strict: bool
) -> AsyncIterator[str]:
    """The lines of every step: one a token; with the last token also, if `full`, one for the whole answer."""
    tokens: list[Token] = []
    try:
        async for [(_, piece)] in answer.steps():
            new = list(piece.tokens)
            if strict and piece.output is not None:
                new = _without_last_text(new)
            tokens += new
            lines = []
            for place, token in enumerate(new):
                shown = _token(token)
                inner = {"details": None, "generated_text": token.shown, "tokens": shown, "top_tokens": [shown]}
                if piece.commit is not None:
                    inner["commit"] = [piece.commit[place]]
                lines.append(line(inner))
            if piece.output is not None and full:
                text = "".join(token.shown for token in tokens)
                shown_tokens = [_token(token) for token in tokens]
                lines.append(line(_answer(text, _reason(piece.output), shown_tokens, request.params.seed or 0)))
            yield "".join(lines)
    except EngineFailedError:
        yield line(_answer(*_FAILED, [], 0))
