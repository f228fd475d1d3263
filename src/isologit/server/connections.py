"""Connections that nobody uses do not stay: requests that never begin, and answers that nobody takes.

uvicorn closes a connection that is idle after an answer. The rest is here.
"""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

LONGEST_HEAD_S = 30.0
LONGEST_STALL_S = 60.0


def close_stalled(listener: socket.socket, seconds: float) -> None:
    """Have the system close accepted connections whose client has taken nothing for so long.

    Linux applies TCP_USER_TIMEOUT (RFC 5482) also to a window that stays shut; elsewhere nothing is done.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        listener.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))


class Connection(H11Protocol):
    """uvicorn's protocol, but a request's head must be complete within `LONGEST_HEAD_S`."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client has connected."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        super().connection_lost(exc)
        self._forget_timer()

    def _watch_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(LONGEST_HEAD_S, self.transport.abort)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
