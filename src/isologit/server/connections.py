"""HTTP/1 connections with bounds: what a client may send before it is answered, and how long it may take.

uvicorn's protocol, which closes a connection that is idle after an answer, with what it leaves out: limits in bytes and
in number on heads, trailers, chunk framing and requests sent ahead; offers to upgrade that are ignored, as RFC 9110
(7.8) allows; answers to HTTP/1.0, which knows no chunks. All of this comes before any key is asked for, so what one
connection can hold in memory must be small: `LARGEST_HEAD_BYTES`, `LARGEST_AHEAD_BYTES`, and one part of what the
network delivered.
"""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

LONGEST_HEAD_S = 30.0
LARGEST_HEAD_BYTES = 32 << 10
LONGEST_TARGET_BYTES = 16 << 10
MOST_HEADERS = 256
MOST_AHEAD = 32  # requests sent before the one in front of them is answered
LARGEST_AHEAD_BYTES = 64 << 10  # of their bodies
FRAMING_PER_BYTE = 8  # a body in chunks of one byte is six times as long as what it carries
MOST_CONNECTIONS = 8192
LONGEST_STALL_S = 60.0
_LONGEST_LINGER_S = 2.0  # between a refusal and the end of its connection, so that the client gets to read it
_LARGEST_LINGER_BYTES = 1 << 20
_PART_BYTES = 16 << 10  # limits are looked at after so many bytes
_OFFER = frozenset({b"upgrade", b"http2-settings"})  # headers of an offer to speak another protocol


def close_stalled(listener: socket.socket, seconds: float) -> None:
    """Have the system close accepted connections whose client has taken nothing for so long.

    Linux applies TCP_USER_TIMEOUT (RFC 5482) also to a window that stays shut; elsewhere nothing is done.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        listener.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))


class Connection(HttpToolsProtocol):
    """One connection. What exceeds a limit ends it, with a status that says so once the running answer is complete."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._running: RequestResponseCycle | None = None  # the request that is being answered
        self._refusal: tuple[int, str] | None = None
        self._in_head = False
        self._num_overhead_bytes = 0  # of the message that is being read: all but its body
        self._num_body_bytes = 0
        self._num_lingering_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    # -- the transport's side -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client has connected."""
        super().connection_made(transport)
        self._watch_head()
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(503, f"there are more than {MOST_CONNECTIONS} connections; try again later")

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        while rest and self._refusal is None:
            rest = self._read(rest)
        if self._refusal is not None:
            self._num_lingering_bytes += len(rest)
            if self._num_lingering_bytes > _LARGEST_LINGER_BYTES:
                self.transport.abort()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        super().connection_lost(exc)
        self._forget_head()
        # NOTE: uvicorn tells only the last request that was sent, and that one may not be running yet
        if self._running is not None:
            self._abandon(self._running)

    def _read(self, data: memoryview) -> memoryview:
        """Parse the first part of what came; returns what is left of it all."""
        part = data[:_PART_BYTES]
        before = self._num_body_bytes
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserUpgrade as offer:
            part = part[: offer.args[0]]
            self._decline_offer()
        except httptools.HttpParserCallbackError:
            self._refuse(400, "the target of the request is not a path; send one that begins with /")
        except httptools.HttpParserError as error:
            if bytes(part[:3]) == b"PRI":
                self._refuse(505, "HTTP/2 is not spoken here; use HTTP/1.1")
            self._refuse(400, f"this is not HTTP/1.1 ({_one_line(error)}); check the request line and the headers")
        self._num_overhead_bytes += len(part) - max(0, self._num_body_bytes - before)
        self._check_limits()
        return data[len(part) :]

    def _decline_offer(self) -> None:
        """Read the head again without its offer of another protocol, so that the body is read as a body.

        The parser takes what follows an offer for the other protocol.
        """
        method = self.scope["method"]
        if method == "CONNECT":
            self._refuse(405, "this is not a proxy; send the request to a path")
            return
        head = [f"{method} ".encode(), self.url, f" HTTP/{self.scope['http_version']}\r\n".encode()]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(option for option in value.split(b",") if option.strip().lower() not in _OFFER)
            if name not in _OFFER and (value or name != b"connection"):
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"".join([*head, b"\r\n"]))

    def _check_limits(self) -> None:
        ahead = sum(len(cycle.body) for cycle, _ in self.pipeline)
        if self._in_head and len(self.url) > LONGEST_TARGET_BYTES:
            self._refuse(414, f"the path of the request is longer than {LONGEST_TARGET_BYTES} bytes")
        elif self._in_head and len(self.headers) > MOST_HEADERS:
            self._refuse(431, f"the request has more than {MOST_HEADERS} headers")
        elif self._num_overhead_bytes > LARGEST_HEAD_BYTES + FRAMING_PER_BYTE * self._num_body_bytes:
            what, status = ("head", 431) if self._in_head or not self._num_body_bytes else ("chunk framing", 400)
            self._refuse(status, f"the {what} of the request is longer than {LARGEST_HEAD_BYTES} bytes")
        elif len(self.pipeline) > MOST_AHEAD or ahead > LARGEST_AHEAD_BYTES:
            self._refuse(429, f"more than {MOST_AHEAD} requests or {LARGEST_AHEAD_BYTES} bytes were sent ahead; wait "
                              "for the answer first")  # fmt: skip

    def _refuse(self, status: int, message: str) -> None:
        """End the connection, after the answer that is running; nothing else that was sent is answered."""
        if self._refusal is not None:
            return
        self._refusal = (status, message)
        self.pipeline.clear()
        running = self._running
        if running is not None and running.more_body and not running.response_started:
            self._abandon(running)  # its own body is at fault
        if self._running is None:
            self._say_refusal()

    def _abandon(self, running: RequestResponseCycle) -> None:
        """Tell the application that nobody waits for this answer any longer."""
        self._running = None
        running.disconnected = True
        running.message_event.set()

    def _say_refusal(self) -> None:
        assert self._refusal is not None
        status, message = self._refusal
        body = message.encode("ascii", "backslashreplace")
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: text/plain; charset=utf-8\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # NOTE: closing while bytes arrive resets the connection, and the client may never read why
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._forget_head()
        self._head_timer = self.loop.call_later(_LONGEST_LINGER_S, self.transport.abort)

    def _watch_head(self) -> None:
        if self._refusal is not None:
            return
        if self._running is not None:
            self._forget_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(LONGEST_HEAD_S, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # -- the parser's side ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = True
        self._num_overhead_bytes = self._num_body_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer: those are dropped, as nothing here has a use for them."""
        if self._in_head and len(self.headers) <= MOST_HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        if self.parser.should_upgrade():
            self.scope["method"] = self.parser.get_method().decode("ascii")
            self.scope["http_version"] = self.parser.get_http_version()
            return
        self._check_limits()
        self._in_head = False
        self._num_overhead_bytes = 0
        if self._refusal is None:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._num_body_bytes += len(body)
        if self._refusal is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self._refusal is None and not self.parser.should_upgrade():
            super().on_message_complete()

    # -- the application's side -----------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            cycle.__class__ = _UnchunkedCycle
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """An answer is complete."""
        self._running = None
        if self._refusal is not None and not self.transport.is_closing():
            self._say_refusal()
        else:
            super().on_response_complete()


class _UnchunkedCycle(RequestResponseCycle):
    """An answer to HTTP/1.0: one without a content-length ends where the connection ends."""

    _is_open_ended = False

    async def send(self, message: Any) -> None:
        """ASGI's send."""
        if message["type"] == "http.response.start":
            if all(name.lower() != b"content-length" for name, _ in message.get("headers", [])):
                self._is_open_ended, self.chunked_encoding = True, False
        elif self._is_open_ended:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
