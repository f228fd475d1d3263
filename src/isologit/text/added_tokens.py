"""Tokens that the files beside a tokenizer name or add. Reads those files as transformers does; knows no vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from isologit.config.model_config import read_json_object
from isologit.errors import ModelError

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


@dataclass(frozen=True)
class AddedTokens:
    """What the files say. `names` are texts of special tokens by their role, such as `unk_token`.

    `tokens` are those of `added_tokens_decoder` or `added_tokens.json` by id; `unnumbered` are special tokens that a
    file names and no file numbers.
    """

    names: Mapping[str, str]
    tokens: Mapping[int, tokenizers.AddedToken]
    unnumbered: tuple[tokenizers.AddedToken, ...]


def read_added_tokens(folder: Path, config: Mapping[str, Any]) -> AddedTokens:
    """Read `special_tokens_map.json` and `added_tokens.json` unless `tokenizer_config.json` (`config`) has it all.

    Raises ModelError naming the file and what in it is malformed.
    """
    source = folder / "tokenizer_config.json"
    values = dict(config)
    numbered = config.get("added_tokens_decoder")
    if numbered is None:
        values |= _optional(folder / "special_tokens_map.json")
        numbered = {}
    named = {role: _token(values[role], source) for role in _NAMES if values.get(role) is not None}
    more = [item for key in _MORE for item in _items(values.get(key))]
    special = [*named.values(), *(_token(item, source) for item in more)]
    if not isinstance(numbered, Mapping):
        raise ModelError(f"{source}: added_tokens_decoder must be an object of tokens by id; copy the tokenizer again")
    tokens = {_number(key, source): _token(item, source, special=False) for key, item in numbered.items()}
    if not tokens:
        special_texts = {token.content for token in special}
        source = folder / "added_tokens.json"
        for text, number in _optional(source).items():
            tokens[_number(number, source)] = tokenizers.AddedToken(
                text, special=text in special_texts, normalized=text not in special_texts
            )
    for token in tokens.values():
        token.special |= token.content in {named.content for named in special}
    known = {token.content for token in tokens.values()}
    unnumbered = {token.content: token for token in special if token.content not in known}
    names = {role: token.content for role, token in named.items()}
    return AddedTokens(names, dict(sorted(tokens.items())), tuple(unnumbered.values()))


class TokenSplitter:
    """Cuts text at tokens. At one place the longest wins; white space goes with a token as its flags say."""

    def __init__(self, tokens: Mapping[int, tokenizers.AddedToken], spelled: Mapping[int, str]) -> None:
        """`spelled` says how each token is written in the text."""
        self._found = {spelled[i]: (i, token) for i, token in tokens.items()}
        longest_first = sorted(self._found, key=len, reverse=True)
        self._pattern = re.compile("|".join(self._written(spelling) for spelling in longest_first) or "(?!)")

    def _written(self, spelling: str) -> str:
        _, token = self._found[spelling]
        pattern = re.escape(spelling)
        return rf"(?<!\w){pattern}(?!\w)" if token.single_word else pattern

    def split(self, text: str) -> Iterator[str | int]:
        """Stretches of text, some of them empty, and between them the ids of tokens."""
        end = 0
        for found in self._pattern.finditer(text):
            token_id, token = self._found[found[0]]
            between = text[end : found.start()]
            yield between.rstrip() if token.lstrip else between
            yield token_id
            end = found.end()
            if token.rstrip:
                end += len(text[end:]) - len(text[end:].lstrip())
        yield text[end:]


def _optional(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _items(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


def _token(value: Any, source: Path, *, special: bool = True) -> tokenizers.AddedToken:
    """A token given by its text, or by an object with `content` and flags."""
    flags = {"special": special, "normalized": not special}
    if isinstance(value, Mapping):
        flags |= {name: bool(value[name]) for name in _FLAGS if name in value}
        flags["special"] |= special
        value = value.get("content")
    if not isinstance(value, str) or not value:
        raise ModelError(f"{source}: a special or added token must be text, not {value!r}; copy the tokenizer again")
    return tokenizers.AddedToken(value, **flags)


def _number(value: Any, source: Path) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise ModelError(f"{source}: {value!r} is not the id of an added token; copy the tokenizer again")
    return number
