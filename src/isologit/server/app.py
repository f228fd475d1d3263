"""The application: all dialects on one service, and how errors become answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from isologit import __version__
from isologit.engine.async_engine import ClientGoneError, EngineFailedError
from isologit.errors import ModelError, RequestError
from isologit.server import llm_serving, openai_api, tgi
from isologit.server.gate import Gate
from isologit.server.responses import error_response
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
    for dialect in (llm_serving, openai_api, tgi):
        app.include_router(dialect.router(service))

    @app.get("/metrics", tags=["metrics"])
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    _handle_errors(app)
    app.add_middleware(Gate, service=service)
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
            return error_response(http.url.path, status, str(error))

        return answer

    for kind, status in statuses:
        app.add_exception_handler(kind, handler(status))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        faults = error.errors()[:_SHOWN_FAULTS]
        places = [f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}" for fault in faults]
        status = 400 if http.url.path.startswith("/v1/") else 422
        return error_response(http.url.path, status, "; ".join(places))

    @app.exception_handler(HTTPException)
    async def refused(http: Request, error: HTTPException) -> Response:
        response = error_response(http.url.path, error.status_code, error.detail)
        response.headers.update(error.headers or {})
        return response
