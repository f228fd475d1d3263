"""Text of tokens that come one at a time. Owns the bytes that are not yet a character; each token costs the same."""

from __future__ import annotations

import codecs

from isologit.text.tokenizer import Tokenizer


class Detokenizer:
    """Gives text as soon as it is certain; everything given, in a row, is `tokenizer.decode` of all tokens.

    inner: the text stands behind another, so it keeps the space that it begins with: it is `tokenizer.inner_text`.
    The window never holds more than the tokens that are undecided: at most three, or a run of byte tokens where the
    tokenizer decides about the run as a whole.
    """

    def __init__(self, tokenizer: Tokenizer, *, inner: bool = False) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # tokens before the first text, which loses its leading space; None after it
        self._head: list[int] | None = None if inner else []
        self._pending: list[int] = []  # undecided tokens, all of them byte tokens

    def push(self, token_id: int) -> str:
        """The text that is now certain; often empty for special tokens and parts of characters."""
        tokenizer = self._tokenizer
        if not tokenizer.is_text(token_id):
            return ""
        data = tokenizer.byte_value(token_id)
        if tokenizer.byte_mode == "all":
            return self._utf8.decode(data or b"")
        self._pending.append(token_id)
        if data is None:
            return self._take(len(self._pending))
        return self._take(self._num_settled()) if tokenizer.byte_mode == "each" else ""

    def finish(self) -> str:
        """The rest; incomplete characters become U+FFFD."""
        if self._tokenizer.byte_mode == "all":
            return self._utf8.decode(b"", final=True)
        return self._take(len(self._pending))

    def _num_settled(self) -> int:
        """How many of the pending byte tokens cannot become part of a longer character."""
        data = b"".join(self._tokenizer.byte_value(i) or b"" for i in self._pending)
        start = 0
        while start < len(data):
            length = _utf8_length(data[start])
            character = data[start : start + length]
            if len(character) < length and all(byte & 0xC0 == 0x80 for byte in character[1:]):
                break
            start += length if _is_utf8(character) else 1
        return start

    def _take(self, count: int) -> str:
        """Text of the first `count` pending tokens, which are no longer pending."""
        taken, self._pending = self._pending[:count], self._pending[count:]
        if not taken:
            return ""
        if self._head is None:
            return self._tokenizer.inner_text(taken)
        self._head += taken
        text = self._tokenizer.decode(self._head)
        if text:
            self._head = None
        return text


def _utf8_length(lead: int) -> int:
    """Bytes of the character a lead byte begins; 1 for a byte that begins none."""
    return 2 if 0xC2 <= lead <= 0xDF else 3 if 0xE0 <= lead <= 0xEF else 4 if 0xF0 <= lead <= 0xF4 else 1


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
