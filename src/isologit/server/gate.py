"""What every request meets first: the API key, the limits on its body, and the answer to an unexpected error.

Plain ASGI, so that streams pass through untouched. It reads the body itself: what is too large, or does not come, never
reaches a dialect, however it is sent.
"""

from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isologit.common.logs import log_error
from isologit.server.bodies import refusal_of_headers
from isologit.server.fields import WARNING_HEADER, WARNINGS, warning
from isologit.server.responses import error_response
from isologit.server.service import Service

_OPEN_PATHS = frozenset({"/health", "/ping"})  # no key is needed to see whether the server lives
_LONGEST_BODY_S = 30.0
_MOST_BODY_BYTES = 128 << 20  # of all requests that are read or answered; two of the largest fit at least


class _DisconnectedError(Exception):
    """The client left while it was sending."""


class _CrowdedError(Exception):
    """The bodies of all requests together are too large."""


class Gate:
    """ASGI middleware before everything else. HEAD is answered as GET; the connection leaves out the body."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._bodies = _Bodies(max(_MOST_BODY_BYTES, 2 * service.limits.max_body_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        started = False
        share = _Share(self._bodies)

        async def counting(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                self._service.metrics.responses[message["status"]] += 1
                if unknown := scope.get(WARNINGS):
                    message["headers"] = [*message["headers"], (WARNING_HEADER.encode(), warning(unknown))]
            await send(message)

        try:
            await self._pass(scope, receive, counting, share)
        except _DisconnectedError:
            return
        except Exception as error:
            log_error("a request failed", error)
            if not started:
                answer = error_response(scope["path"], 500, f"internal error ({type(error).__name__})")
                await answer(scope, receive, counting)
        finally:
            share.give_back()

    async def _pass(self, scope: Scope, receive: Receive, send: Send, share: _Share) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        refusal = self._refusal(scope["method"], path, headers)
        body: bytes | None = b""
        if refusal is None:
            try:
                async with asyncio.timeout(_LONGEST_BODY_S):
                    body = await _read(receive, self._service.limits.max_body_bytes, share)
            except _CrowdedError:
                refusal = 503, "the server holds as many and as large requests as it can; try again later"
            except TimeoutError:
                refusal = 408, f"the body did not arrive within {_LONGEST_BODY_S:g} s"
        if body is None:
            refusal = self._too_large()
        elif refusal is None and scope["method"] == "POST":
            refusal = refusal_of_headers(headers, has_body=bool(body))
        if refusal is not None:
            # NOTE: the server drops what is still on its way, so the client gets to read this
            response = error_response(path, *refusal)
            if refusal[0] == 408:
                response.headers["connection"] = "close"
            elif refusal[0] == 401:
                response.headers["www-authenticate"] = "Bearer"
            elif refusal[0] == 415:
                response.headers["accept-encoding"] = "identity"
            await response(scope, receive, send)
            return
        given = False

        async def replaying() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body or b"", "more_body": False}

        await self._app(scope, replaying, send)

    def _refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        service = self._service
        if service.api_key is not None and path not in _OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            known = scheme.lower() == "bearer"  # RFC 9110 (11.1): in any case
            if not hmac.compare_digest(key.strip(" ").encode("latin-1"), service.api_key.encode()) or not known:
                return 401, "the API key is missing or wrong; send Authorization: Bearer KEY"
        if method == "POST" and service.draining:
            return 503, "the server is shutting down"
        if int(headers.get("content-length", "0")) > service.limits.max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> tuple[int, str]:
        limit = self._service.limits.max_body_bytes
        return 413, f"the body is larger than the limit of {limit} bytes; send less at once"


class _Bodies:
    """The bytes of all bodies that are read or answered, which must not become too many together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_bytes = 0

    def take(self, count: int) -> None:
        """Raises _CrowdedError when it is too much; what was taken stays taken until it is given back."""
        self._num_bytes += count
        if self._num_bytes > self._most:
            raise _CrowdedError

    def give_back(self, count: int) -> None:
        """A request is over."""
        self._num_bytes -= count


class _Share:
    """What one request has taken of them."""

    def __init__(self, bodies: _Bodies) -> None:
        self._bodies = bodies
        self._num_bytes = 0

    def take(self, count: int) -> None:
        """As `_Bodies.take`."""
        self._num_bytes += count
        self._bodies.take(count)

    def give_back(self) -> None:
        """The request is over."""
        self._bodies.give_back(self._num_bytes)


async def _read(receive: Receive, limit: int, share: _Share) -> bytes | None:
    """The body, or None when it is longer than `limit` bytes."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _DisconnectedError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        share.take(len(parts[-1]))
        if size > limit:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)
