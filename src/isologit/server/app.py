"""The application: all dialects on one service, and how errors become answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from isologit import __version__
from isologit.engine.async_engine import ClientGoneError, EngineFailedError
from isologit.engine.request_limits import PromptTooLongError
from isologit.errors import ModelError, RequestError
from isologit.server import commitments, llm_serving, openai_api, tgi, tokens_api
from isologit.server.fields import WARNING_HEADER, FieldError
from isologit.server.gate import Gate
from isologit.server.responses import error_response, is_openai
from isologit.server.service import (
    QueueFullError,
    RequestTimeoutError,
    Service,
    ShuttingDownError,
    UnknownModelError,
)

_CLIENT_CLOSED = 499
_SHOWN_FAULTS = 5


def create_app(service: Service, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The ASGI application. on_failure: called when the engine cannot go on."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start(on_failure)
        yield
        service.engine.stop()

    app = FastAPI(title="isologit", version=__version__, lifespan=lifespan)
    for dialect in (llm_serving, openai_api, tgi, tokens_api):
        app.include_router(dialect.router(service))
    if service is not None and service.commitments is not None:
        app.include_router(commitments.router(service.commitments))

    @app.get("/ping", tags=["health"], operation_id="ping")
    @app.post("/ping", tags=["health"], operation_id="post_ping")
    async def ping() -> Response:
        return Response(status_code=200 if service.engine.failed is None else 503)

    @app.get("/version", tags=["health"])
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", tags=["metrics"])
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    _handle_errors(app)
    app.add_middleware(Gate, service=service)
    if service.allowed_origins:  # NOTE: outside of the gate, as a browser asks for leave without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[WARNING_HEADER],
        )
    return app


def _handle_errors(app: FastAPI) -> None:
    statuses: list[tuple[type[Exception], int]] = [
        (UnknownModelError, 404),
        (RequestError, 400),
        (ModelError, 400),
        (QueueFullError, 429),
        (ShuttingDownError, 503),
        (RequestTimeoutError, 504),
        (EngineFailedError, 500),
        (ClientGoneError, _CLIENT_CLOSED),
    ]

    def handler(status: int) -> Callable[[Request, Exception], Response]:
        def answer(http: Request, error: Exception) -> Response:
            param = error.field if isinstance(error, FieldError) else None
            return error_response(http.url.path, status, str(error), param=param)

        return answer

    for kind, status in statuses:
        app.add_exception_handler(kind, handler(status))

    @app.exception_handler(PromptTooLongError)
    async def too_long(http: Request, error: PromptTooLongError) -> Response:
        message = str(error)
        if not is_openai(http.url.path):  # TGI's words
            message = (
                f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= {error.limit}. Given: "
                f"{error.prompt_tokens} `inputs` tokens and {error.max_tokens} `max_new_tokens`"
            )
        return error_response(http.url.path, 400, message, code="context_length_exceeded")

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        faults = error.errors()[:_SHOWN_FAULTS]
        places = [f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}" for fault in faults]
        status = 400 if is_openai(http.url.path) else 422
        param = next((str(fault["loc"][1]) for fault in faults if len(fault["loc"]) > 1), None)
        return error_response(http.url.path, status, "; ".join(places), param=param)

    @app.exception_handler(HTTPException)
    async def refused(http: Request, error: HTTPException) -> Response:
        response = error_response(http.url.path, error.status_code, error.detail)
        response.headers.update(error.headers or {})
        return response
