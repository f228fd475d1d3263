"""Bytes of a streamed answer to messages, the same ones however the network cuts the bytes. Knows no dialect."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_DONE = b"[DONE]"
_OTHER_FIELDS = (b":", b"event:", b"id:", b"retry:")  # of server-sent events; a line that begins with `:` is a comment
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Message:
    """One message of an answer.

    text: what it adds to the answer. is_token: it carries a token, even one without text. final: the answer is complete
    behind it. full_text: the whole answer, when the last message repeats it. num_tokens: the server's count of output
    tokens. error: why the answer failed.
    """

    text: str = ""
    is_token: bool = False
    final: bool = False
    finish_reason: str | None = None
    full_text: str | None = None
    num_tokens: int | None = None
    error: str | None = None


class MessageStream:
    """Reads lines of bare JSON and server-sent events alike, one JSON value a line.

    read: turns the JSON value of a line into a message; what it raises becomes a message with `error`.
    """

    def __init__(self, read: Callable[[Any], Message]) -> None:
        self._read = read
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """Messages whose lines are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return self._messages(lines)

    def finish(self) -> list[Message]:
        """Messages of what came behind the last line break."""
        lines, self._rest = [self._rest], b""
        return self._messages(lines)

    def _messages(self, lines: list[bytes]) -> list[Message]:
        stripped = (line.strip() for line in lines)
        return [self._message(line) for line in stripped if line and not line.startswith(_OTHER_FIELDS)]

    def _message(self, line: bytes) -> Message:
        payload = line.removeprefix(b"data:").lstrip()
        if payload == _DONE:
            return Message(final=True)
        try:
            return self._read(json.loads(payload))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            shown = payload[:_SHOWN].decode(errors="replace")
            return Message(error=f"the answer holds a line that is not of this protocol: {shown}")
