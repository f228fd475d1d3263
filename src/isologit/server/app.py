"""The application: all dialects on one service, and how errors become answers.

Owns the limits that hold before a dialect is reached: the API key, the size of a body, and refusing while draining.
"""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isologit import __version__
from isologit.errors import ModelError, RequestError
from isologit.server import llm_serving, openai_api, tgi
from isologit.server.engine_thread import ClientGoneError, EngineFailedError
from isologit.server.service import (
    QueueFullError,
    RequestTimeoutError,
    Service,
    ShuttingDownError,
    UnknownModelError,
)

_OPEN_PATHS = frozenset({"/health"})  # no key is needed to see whether the server lives
_RETRY_AFTER_S = "1"
_CLIENT_CLOSED = 499
_TGI_STATUSES = {400: 422, 500: 424}  # ours: theirs
_TGI_KINDS = {401: "authentication", 404: "not_found", 424: "generation", 429: "overloaded"}


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
    app.add_middleware(_Gate, service=service)
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
            return _error(http.url.path, status, str(error))

        return answer

    for kind, status in statuses:
        app.add_exception_handler(kind, handler(status))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        places = [f"{'.'.join(map(str, found['loc'][1:]))}: {found['msg']}" for found in error.errors()]
        status = 400 if http.url.path.startswith("/v1/") else 422
        return _error(http.url.path, status, "; ".join(places))


def _error(path: str, status: int, message: str) -> Response:
    """An error in the form of the dialect the path belongs to."""
    headers = {"Retry-After": _RETRY_AFTER_S} if status in (429, 503) else None
    body: dict[str, Any]
    if path.startswith("/v1/"):
        name = "invalid_request_error" if status < 500 else "internal_error"
        body = {"error": {"message": message, "type": name, "param": None, "code": status}}
    elif path.startswith("/models/"):
        body = {"detail": message}
    else:
        status = _TGI_STATUSES.get(status, status)
        body = {"error": message, "error_type": _TGI_KINDS.get(status, "validation" if status < 500 else "generation")}
    return JSONResponse(body, status, headers)


class _Gate:
    """ASGI middleware before everything else; plain, so that streams pass through it untouched."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        limit, seen, started, refused = self._service.limits.max_body_bytes, 0, False, False

        async def limited() -> Message:
            nonlocal seen, refused
            message = await receive()
            seen += len(message.get("body", b""))
            refused = refused or seen > limit
            return {"type": "http.disconnect"} if refused else message

        async def sending(message: Message) -> None:
            nonlocal started
            if refused and not started:
                started = True
                await self._too_large(scope)(scope, receive, send)
            elif not refused:
                started = True
                await send(message)

        await self._app(scope, limited, sending)
        if refused and not started:
            await self._too_large(scope)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        service, path = self._service, scope["path"]
        headers = dict(scope["headers"])
        if service.api_key is not None and path not in _OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {service.api_key}".encode()):
                return _error(path, 401, "the API key is missing or wrong; send Authorization: Bearer KEY")
        if scope["method"] == "POST" and service.draining:
            return _error(path, 503, "the server is shutting down")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > service.limits.max_body_bytes:
            return self._too_large(scope)
        return None

    def _too_large(self, scope: Scope) -> Response:
        limit = self._service.limits.max_body_bytes
        return _error(scope["path"], 413, f"the body is larger than the limit of {limit} bytes; send less at once")
