"""Text Generation Inference's API: /generate, /generate_stream, / (either, by `stream`), /info, /health.

Parameters that would change an answer and are not implemented are refused, never ignored.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from isologit import __version__
from isologit.engine.async_engine import EngineFailedError
from isologit.engine.request import GenerationRequest, RequestOutput, SamplingParams
from isologit.server.bodies import json_router
from isologit.server.commitments import REQUEST_ID_HEADER
from isologit.server.fields import TGI, Body, FieldError, Ignored
from isologit.server.responses import StreamedAnswer
from isologit.server.service import Answer, Service, Token
from isologit.server.token_names import best_tokens, token_name

_DEFAULT_NEW_TOKENS = 100
_MOST_STOPS = 16
_MOST_TOP_TOKENS = 5
_MOST_SEED_BITS = 53  # what JavaScript reads without loss


class Parameters(Body):
    """TGI's parameters; None takes the default."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    do_sample: bool | None = False
    temperature: float | None = Field(default=None, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=0)
    stop: list[str] | None = Field(default=None, max_length=_MOST_STOPS)
    truncate: int | None = Field(default=None, ge=1)
    return_full_text: bool | None = False
    details: bool | None = False
    top_n_tokens: int | None = Field(default=None, ge=0, le=_MOST_TOP_TOKENS)
    best_of: int | None = Field(default=None, ge=1)
    decoder_input_details: bool | None = False
    ignore_eos_token: bool | None = False

    def check(self, http: Request) -> None:
        """Raises FieldError for parameters that would have to change the answer."""
        self.check_others(TGI, http)
        if (self.best_of or 1) > 1:
            raise FieldError("best_of", "best_of above 1 is not supported; leave it out")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn: if told so, or if a parameter is set that has no other meaning, as in TGI."""
        narrowed = self.top_k is not None or self.top_p not in (None, 1.0)
        return bool(self.do_sample) or narrowed or self.temperature not in (None, 1.0)


class GenerateRequest(Body):
    """The body of every POST; `stream` matters at `/` only."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = False

    @property
    def asked(self) -> Parameters:
        """The parameters, even when the client sent none."""
        return self.parameters or Parameters()

    @property
    def echoed(self) -> str:
        """What stands before the generated text."""
        return self.inputs if self.asked.return_full_text else ""


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = json_router(tags=["tgi"])

    async def whole(body: GenerateRequest, http: Request) -> dict[str, Any]:
        request = await _request(service, body, http, shows_logprobs=bool(body.asked.details))
        [(tokens, output)] = await service.collect(http.receive, [request])
        answer: dict[str, Any] = {"generated_text": body.echoed + "".join(token.text for token in tokens)}
        if body.asked.details:
            shown: dict[str, Any] = {
                "prefill": _prefill(service, output),
                "tokens": [_token(service, token) for token in tokens],
            }
            if body.asked.top_n_tokens:
                shown["top_tokens"] = [_top_tokens(service, token, body.asked.top_n_tokens) for token in tokens]
            answer["details"] = {**_details(request, output), **shown}
        return answer

    async def streamed(body: GenerateRequest, http: Request) -> Response:
        if body.asked.decoder_input_details:
            raise FieldError("decoder_input_details", "decoder_input_details are not streamed; leave them out")
        request = await _request(service, body, http, shows_logprobs=True)
        answer = service.answer([request], client_id=http.headers.get(REQUEST_ID_HEADER))
        return StreamedAnswer(answer, _events(service, answer, request, body))

    @routes.post("/generate")
    async def generate(body: GenerateRequest, http: Request) -> Response:
        return JSONResponse(await whole(body, http))

    @routes.post("/generate_stream")
    async def generate_stream(body: GenerateRequest, http: Request) -> Response:
        return await streamed(body, http)

    @routes.post("/")
    async def either(body: GenerateRequest, http: Request) -> Response:
        return await streamed(body, http) if body.stream else JSONResponse([await whole(body, http)])

    @routes.get("/info")
    async def info() -> dict[str, Any]:
        return {
            "model_id": service.names[0],
            "model_sha": None,
            "model_dtype": service.config.dtype,
            "model_device_type": "cpu",
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": service.limits.max_queue,
            "max_best_of": 1,
            "max_stop_sequences": _MOST_STOPS,
            "max_input_tokens": service.limits.max_model_len - 1,
            "max_total_tokens": service.limits.max_model_len,
            "router": "isologit",
            "version": __version__,
            "sha": None,
            "docker_label": None,
        }

    @routes.get("/health")
    async def health() -> Response:
        if service.engine.failed is not None:
            return JSONResponse({"error": service.engine.failed, "error_type": "healthcheck"}, 503)
        return Response()

    return routes


async def _request(
    service: Service, body: GenerateRequest, http: Request, *, shows_logprobs: bool
) -> GenerationRequest:
    """A request that can run. A seed is drawn here where tokens are drawn and none is given, so that it can be told."""
    asked = body.asked
    body.check_others({"model": Ignored("there is one model")}, http)
    asked.check(http)
    drawn = secrets.randbits(_MOST_SEED_BITS) if asked.samples and asked.seed is None else asked.seed
    params = SamplingParams(
        max_tokens=asked.max_new_tokens or _DEFAULT_NEW_TOKENS,
        temperature=(asked.temperature or 1.0) if asked.samples else 0.0,
        top_k=asked.top_k or 0,
        top_p=asked.top_p or 1.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        seed=drawn,
        stop=tuple(stop for stop in asked.stop or () if stop),
        ignore_eos=bool(asked.ignore_eos_token),
        logprobs=asked.top_n_tokens or 0 if shows_logprobs else None,
        prompt_logprobs=0 if asked.decoder_input_details and asked.details else None,
    )
    service.check_capacity(1)
    ids = await service.prompt_ids(body.inputs)
    ids = ids if asked.truncate is None else ids[-asked.truncate :]
    return service.request(ids, params, is_echoed=bool(asked.return_full_text))


def _prefill(service: Service, output: RequestOutput) -> list[dict[str, Any]]:
    """The prompt's tokens, if they were asked for; nothing predicts the first."""
    if output.prompt_logprobs is None:
        return []
    return [
        {"id": i, "text": token_name(service.tokenizer, i), "logprob": None if found is None else found[i]}
        for i, found in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    ]


def _token(service: Service, token: Token) -> dict[str, Any]:
    logprob = token.logprobs[token.id] if token.logprobs else None
    return {"id": token.id, "text": token.text, "logprob": logprob, "special": not service.tokenizer.is_text(token.id)}


def _top_tokens(service: Service, token: Token, count: int) -> list[dict[str, Any]]:
    """The most likely tokens in place of this one, the likeliest first."""
    best = best_tokens(token.logprobs or {}, count)
    return [_token(service, _candidate(service, i, value)) for i, value in best]


def _candidate(service: Service, token_id: int, logprob: float) -> Token:
    text = service.tokenizer.inner_text([token_id])
    return Token(token_id, text, text, {token_id: logprob})


def _details(request: GenerationRequest, output: RequestOutput) -> dict[str, Any]:
    reason = output.finish_reason
    if reason == "stop":
        reason = "stop_sequence" if output.stop_reason is not None else "eos_token"
    return {"finish_reason": reason, "generated_tokens": len(output.token_ids), "seed": request.params.seed}


async def _events(
    service: Service, answer: Answer, request: GenerationRequest, body: GenerateRequest
) -> AsyncIterator[str]:
    """One event a token; the last holds the whole text. Lines are ASCII: some clients also split at U+2028."""
    count, number, text = body.asked.top_n_tokens, 0, ""
    try:
        async for [(_, piece)] in answer.steps():
            events = []
            for place, (token, output) in enumerate(_with_output(piece.tokens, piece.output)):
                number += 1
                text += token.text
                event: dict[str, Any] = {"index": number, "token": _token(service, token)}
                if count:
                    event["top_tokens"] = _top_tokens(service, token, count)
                event |= {"generated_text": None, "details": None}
                if piece.commit is not None:
                    event["commit"] = [piece.commit[place]]
                if output is not None:
                    event["generated_text"] = body.echoed + text
                    if body.asked.details:
                        details = _details(request, output)
                        event["details"] = {**details, "input_length": len(request.prompt_token_ids)}
                events.append(f"data:{json.dumps(event)}\n\n")
            yield "".join(events)
    except EngineFailedError as error:
        yield f"data:{json.dumps({'error': str(error), 'error_type': 'generation'})}\n\n"


def _with_output(tokens: Sequence[Token], output: RequestOutput | None) -> list[tuple[Token, RequestOutput | None]]:
    """The tokens of a step, the output with the last of them."""
    return [(token, output if place == len(tokens) else None) for place, token in enumerate(tokens, 1)]
