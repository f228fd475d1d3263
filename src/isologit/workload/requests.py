"""What a prompt file becomes: requests that can be run, and records that cannot, each with its place in the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class TextEncoder(Protocol):
    """What this room needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids as the model is fed them (BOS first if it uses one)."""

    def encode_without_bos(self, text: str) -> list[int]:
        """Token ids of the text alone."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens skipped."""


@dataclass(frozen=True)
class RequestSpec:
    """One prompt to run: text or token ids, at most `max_new_tokens` output tokens, and where it was found."""

    id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    max_new_tokens: int
    where: str


@dataclass(frozen=True)
class BadRequest:
    """A record that cannot be run; the others of its file can."""

    id: str
    where: str
    error: str
    prompt: str | None = None
