"""Text Generation Inference's API: /generate, /generate_stream, /info, /health."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from isologit import __version__
from isologit.engine.request import GenerationRequest, RequestOutput, SamplingParams
from isologit.server.engine_thread import EngineFailedError
from isologit.server.service import Service, Token

_DEFAULT_NEW_TOKENS = 100


class Parameters(BaseModel):
    """Fields of TGI that mean something here; others are ignored."""

    model_config = ConfigDict(extra="ignore")

    max_new_tokens: int | None = Field(default=None, ge=1)
    do_sample: bool = False
    temperature: float | None = Field(default=None, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=0)
    stop: list[str] = Field(default_factory=list, max_length=16)
    return_full_text: bool | None = False
    details: bool = True
    decoder_input_details: bool = False
    ignore_eos_token: bool = False


class GenerateRequest(BaseModel):
    """The body of /generate and /generate_stream."""

    model_config = ConfigDict(extra="ignore")

    inputs: str
    parameters: Parameters = Field(default_factory=lambda: Parameters())


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["tgi"])

    @routes.post("/generate")
    async def generate(body: GenerateRequest, http: Request) -> Response:
        request = _request(service, body)
        service.check_capacity()
        tokens, output = await service.collect(http, request)
        text = (body.inputs if body.parameters.return_full_text else "") + output.text
        answer: dict[str, Any] = {"generated_text": text}
        if body.parameters.details:
            answer["details"] = {**_details(request, output), "prefill": [], "tokens": [_token(t) for t in tokens]}
        return JSONResponse(answer)

    @routes.post("/generate_stream")
    async def generate_stream(body: GenerateRequest) -> Response:
        request = _request(service, body)
        service.check_capacity()
        return StreamingResponse(_events(service, request, body), media_type="text/event-stream")

    @routes.get("/info")
    async def info() -> dict[str, Any]:
        return {
            "model_id": service.names[0],
            "model_dtype": service.config.dtype,
            "model_device_type": "cpu",
            "max_concurrent_requests": service.limits.max_queue,
            "max_input_tokens": service.limits.max_model_len - 1,
            "max_total_tokens": service.limits.max_model_len,
            "router": "isologit",
            "version": __version__,
        }

    @routes.get("/health")
    async def health() -> Response:
        if service.engine.failed is not None:
            return JSONResponse({"error": service.engine.failed, "error_type": "healthcheck"}, 503)
        return Response()

    return routes


def _request(service: Service, body: GenerateRequest) -> GenerationRequest:
    asked = body.parameters
    sample = asked.do_sample or any(v is not None for v in (asked.temperature, asked.top_k, asked.top_p))
    params = SamplingParams(
        max_tokens=asked.max_new_tokens or _DEFAULT_NEW_TOKENS,
        temperature=(asked.temperature or 1.0) if sample else 0.0,
        top_k=asked.top_k or 0,
        top_p=asked.top_p or 1.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        seed=asked.seed,
        stop=tuple(stop for stop in asked.stop if stop),
        ignore_eos=asked.ignore_eos_token,
        logprobs=0,
    )
    return service.request(body.inputs, params)


def _token(token: Token) -> dict[str, Any]:
    logprob = token.logprobs[token.id] if token.logprobs else None
    return {"id": token.id, "text": token.text, "logprob": logprob, "special": token.text == ""}


def _details(request: GenerationRequest, output: RequestOutput) -> dict[str, Any]:
    reason = output.finish_reason
    if reason == "stop":
        reason = "stop_sequence" if output.stop_reason is not None else "eos_token"
    return {"finish_reason": reason, "generated_tokens": len(output.token_ids), "seed": request.params.seed}


async def _events(service: Service, request: GenerationRequest, body: GenerateRequest) -> AsyncIterator[str]:
    """One event a token; the last holds the whole text."""
    number = 0
    try:
        async for piece in service.stream(request):
            for place, token in enumerate(piece.tokens, 1):
                number += 1
                last = piece.output if place == len(piece.tokens) else None
                full_text = None
                if last is not None:
                    full_text = (body.inputs if body.parameters.return_full_text else "") + last.text
                event = {
                    "index": number,
                    "token": _token(token),
                    "generated_text": full_text,
                    "details": None if last is None else _details(request, last),
                }
                yield f"data:{json.dumps(event, ensure_ascii=False)}\n\n"
    except EngineFailedError as error:
        yield f"data:{json.dumps({'error': str(error), 'error_type': 'generation'})}\n\n"
