"""Responses that stream an answer and end with their client."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from isologit.server.engine_thread import ClientGoneError
from isologit.server.service import Answer


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
