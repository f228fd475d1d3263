"""How OpenAI's two kinds of answer look: a completion's choice and a chat's, whole and in part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from isologit.server.service import Token
from isologit.server.token_names import best_tokens, shown_logprobs, token_name
from isologit.text.tokenizer import Tokenizer


class Style(ABC):
    """The names of one kind of answer and the shape of its choices.

    logprobs: how many most likely tokens are shown beside each, None for no log-probabilities at all.
    ids_as_names: tokens are called `token_id:17` instead of by their text.
    """

    prefix: str
    whole_object: str
    part_object: str
    first: Mapping[str, Any] | None = None  # what the first part of a choice says
    has_one_prompt = False

    def __init__(self, tokenizer: Tokenizer, logprobs: int | None, *, ids_as_names: bool) -> None:
        self._tokenizer = tokenizer
        self.logprobs = logprobs
        self._ids_as_names = ids_as_names

    @abstractmethod
    def whole(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """A choice that is complete."""

    @abstractmethod
    def part(self, text: str, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """What a choice gained; `offset` is how many characters it had before."""

    def prompt_logprobs(
        self, ids: Sequence[int], logprobs: Sequence[Mapping[int, float] | None], count: int
    ) -> list[dict[str, Any] | None]:
        """vLLM's form: for each token of a prompt the likeliest ones and itself, by id; None for the first.

        A rank is told of the `count` likeliest tokens.
        """
        return [
            None
            if found is None
            else {
                str(i): {
                    "logprob": value,
                    "rank": rank if rank <= count else None,
                    "decoded_token": token_name(self._tokenizer, i),
                }
                for rank, (i, value) in enumerate(shown_logprobs(found, token_id, count).items(), 1)
            }
            for token_id, found in zip(ids, logprobs, strict=True)
        ]

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._ids_as_names else token_name(self._tokenizer, token_id)


class CompletionStyle(Style):
    """`text_completion`."""

    prefix = "cmpl"
    whole_object = part_object = "text_completion"

    def whole(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """As `Style.whole`."""
        return self.part(text, tokens, 0)

    def part(self, text: str, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """As `Style.part`."""
        return {"text": text, "logprobs": None if self.logprobs is None else self._logprobs(tokens, offset)}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """Lists with one entry a token. `top_logprobs` are keyed by text: of tokens that share one the likeliest."""
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            shown["tokens"].append(self._name(token.id))
            if token.logprobs is None:  # the first of a prompt, which nothing predicts
                shown["token_logprobs"].append(None)
                shown["top_logprobs"].append(None)
            else:
                found = shown_logprobs(token.logprobs, token.id, self.logprobs or 0)
                shown["token_logprobs"].append(found[token.id])
                shown["top_logprobs"].append({self._name(i): value for i, value in reversed(found.items())})
            shown["text_offset"].append(offset)
            offset += len(token.text)
        return shown


class ChatStyle(Style):
    """`chat.completion`."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    part_object = "chat.completion.chunk"
    has_one_prompt = True
    first: Mapping[str, Any] = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def whole(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """As `Style.whole`."""
        return {"message": {"role": "assistant", "content": text}, "logprobs": self._logprobs(tokens)}

    def part(self, text: str, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """As `Style.part`."""
        return {"delta": {"content": text}, "logprobs": self._logprobs(tokens)}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        content = []
        for token in tokens:
            found = token.logprobs or {}
            others = [self._entry(i, value) for i, value in best_tokens(found, self.logprobs)]
            content.append({**self._entry(token.id, found.get(token.id, 0.0)), "top_logprobs": others})
        return {"content": content}

    def _entry(self, token_id: int, value: float) -> dict[str, Any]:
        """A token with its bytes, which joined over an answer's tokens are its text."""
        return {
            "token": self._name(token_id),
            "logprob": value,
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }
