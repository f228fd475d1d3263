"""Connections that nobody uses do not stay: requests that never begin, and answers that nobody takes.

uvicorn closes a connection that is idle after an answer. The rest is here.
"""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LONGEST_HEAD_S = 30.0
LARGEST_HEAD_BYTES = 64 << 10
LONGEST_STALL_S = 60.0


def close_stalled(listener: socket.socket, seconds: float) -> None:
    """Have the system close accepted connections whose client has taken nothing for so long.

    Linux applies TCP_USER_TIMEOUT (RFC 5482) also to a window that stays shut; elsewhere nothing is done.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        listener.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, but a request's head must be complete within `LONGEST_HEAD_S` and `LARGEST_HEAD_BYTES`."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client has connected."""
        super().connection_made(transport)
        self._watch_head(0)

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        super().data_received(data)
        self._watch_head(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        super().connection_lost(exc)
        self._forget_head()

    def _watch_head(self, num_bytes: int) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._forget_head()
            return
        if cycle is None or not cycle.more_body:  # else it is the rest of a body that was refused, and is dropped
            self._head_bytes += num_bytes
        if self._head_bytes > LARGEST_HEAD_BYTES:
            self.transport.abort()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(LONGEST_HEAD_S, self.transport.abort)

    def _forget_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
