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
    behind it. full_text: the whole answer, when the last message repeats it. num_tokens, num_prompt_tokens: the
    server's own counts so far. error: why the answer failed.
    """

    text: str = ""
    is_token: bool = False
    final: bool = False
    finish_reason: str | None = None
    full_text: str | None = None
    num_tokens: int | None = None
    num_prompt_tokens: int | None = None
    error: str | None = None


class MessageStream:
    """Reads lines of bare JSON and server-sent events alike, one JSON value a line.

    read: turns the JSON value of a line into a message; what it raises becomes a message with `error`. events_only: a
    line of bare JSON is an error, for the dialect's streams are server-sent events. ended: after `[DONE]`; whatever
    comes behind it is no part of the answer.
    """

    def __init__(self, read: Callable[[Any], Message], *, events_only: bool = False) -> None:
        self.ended = False
        self._read = read
        self._events_only = events_only
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
        messages = []
        for line in map(bytes.strip, lines):
            if line and not line.startswith(_OTHER_FIELDS) and not self.ended:
                messages.append(self._message(line))
        return messages

    def _message(self, line: bytes) -> Message:
        payload = line.removeprefix(b"data:").lstrip()
        if payload == _DONE:
            self.ended = True
            return Message(final=True)
        bare = self._events_only and not line.startswith(b"data:")
        in_one_piece = bare and payload.startswith(b"{")
        problem = (
            "the server did not stream" if in_one_piece else "the answer holds a line that is not of this protocol"
        )
        wrong = Message(error=f"{problem}: {payload[:_SHOWN].decode(errors='replace')}")
        try:
            message = self._read(json.loads(payload))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return wrong
        return wrong if bare and message.error is None else message
