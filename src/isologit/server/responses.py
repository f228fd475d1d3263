"""Responses all dialects share: a stream that ends with its client, and errors in each dialect's form."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from isologit.engine.async_engine import ClientGoneError
from isologit.server.service import Answer

_RETRY_AFTER_S = "1"
_TGI_STATUSES = {400: 422, 500: 424}  # ours: theirs
_TGI_KINDS = {401: "authentication", 404: "not_found", 424: "generation", 429: "overloaded"}


class StreamedAnswer(Response):
    """Sends text as it comes. When the client leaves, and however this ends, the answer is closed."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, texts: AsyncIterator[str]) -> None:
        self.status_code = 200
        self.background = None
        self._answer = answer
        self._texts = texts
        self.init_headers({"cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        with self._answer.ends_with_client(receive):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for text in self._texts:
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            except ClientGoneError:
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def is_openai(path: str) -> bool:
    """Whether errors at a path have OpenAI's form."""
    return path.startswith(("/v1/", "/tokenize", "/detokenize"))


def error_response(
    path: str, status: int, message: str, *, code: str | None = None, param: str | None = None
) -> Response:
    """An error in the form of the dialect the path belongs to. ASCII: a message may quote what has no encoding.

    code, param: OpenAI's name of the error and of the field at fault.
    """
    headers = {"Retry-After": _RETRY_AFTER_S} if status in (429, 503) else None
    body: dict[str, Any]
    if is_openai(path):
        name = "invalid_request_error" if status < 500 else "internal_error"
        body = {"error": {"message": message, "type": name, "param": param, "code": code or status}}
    elif path.startswith("/models/"):
        body = {"detail": message}
    else:
        status = _TGI_STATUSES.get(status, status)
        body = {"error": message, "error_type": _TGI_KINDS.get(status, "validation" if status < 500 else "generation")}
    return Response(json.dumps(body), status, headers, media_type="application/json")
