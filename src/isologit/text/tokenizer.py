"""Text to token ids and back, from `tokenizer.json` or a SentencePiece `tokenizer.model`. Knows no model."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers

from isologit.config.model_config import read_json_object
from isologit.errors import ModelError, RequestError
from isologit.text.chat import ChatTemplate

DUMMY_SOURCE = Path("<dummy>")  # stands for the folder of a checkpoint that comes from no file
JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")

# How tokens that stand for bytes become text. "each": a run of byte tokens is read as UTF-8, every invalid byte giving
# one U+FFFD (SentencePiece). "run": one invalid byte turns every byte of its run into U+FFFD (`ByteFallback` of the
# tokenizers library). "all": every token stands for bytes, and the whole is read as UTF-8 (`ByteLevel`).
ByteMode = Literal["each", "run", "all"]


class Tokenizer(ABC):
    """Encodes and decodes. `bos_token_id` and `eos_token_id` are None when the vocabulary has none."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    special_token_ids: frozenset[int]
    byte_mode: ByteMode
    _prefix: list[int]
    _chat_template: ChatTemplate

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, the begin token first if the model uses one, no end token.

        Raises RequestError for text with lone surrogates, which JSON can write and no encoding holds.
        """
        return self._prefix + self.encode_without_bos(text)

    def encode_without_bos(self, text: str) -> list[int]:
        """Token ids of `text` alone. Special tokens written out in the text (`</s>`) become their ids."""
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError("the text is not valid Unicode (it holds a lone surrogate); send whole characters")
        return self._encode(text)

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of the ids. Special tokens and ids outside the vocabulary are skipped."""
        return self._decode([i for i in token_ids if self.is_text(i)])

    @abstractmethod
    def _decode(self, token_ids: list[int]) -> str: ...

    def is_text(self, token_id: int) -> bool:
        """Whether the id decodes to text: in the vocabulary and not special."""
        return 0 <= token_id < self.vocab_size and token_id not in self.special_token_ids

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes a token stands for (see `ByteMode`), or None for a token that stands for characters."""

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token and its text to decode others behind, because what stands first loses its leading space."""
        for token_id in range(self.vocab_size):
            if self.is_text(token_id) and self.token_bytes(token_id) is None:
                text = self._decode([token_id])
                if text.strip():
                    return token_id, text
        raise ModelError("the tokenizer has no token that stands for characters; use the model's own tokenizer")

    @cached_property
    def _inner_texts(self) -> dict[int, str]:
        return {}

    def inner_text(self, token_ids: list[int]) -> str:
        """Text of the ids where other text stands before them. Single ids are remembered."""
        if len(token_ids) == 1 and (known := self._inner_texts.get(token_ids[0])) is not None:
            return known
        anchor, anchor_text = self._anchor
        text = self.decode([anchor, *token_ids])[len(anchor_text) :]
        if len(token_ids) == 1:
            self._inner_texts[token_ids[0]] = text
        return text

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as one prompt; encode it with `encode_without_bos`, since templates write the begin token.

        A message is `{"role": "user", "content": "..."}`. Raises ModelError when the model has no usable template,
        RequestError when the template refuses the messages.
        """
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt)


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`, in the way of Hugging Face's original LLaMA tokenizer."""

    byte_mode: ByteMode = "each"

    def __init__(self, file: Path) -> None:
        try:
            sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ModelError(f"{file}: is not a SentencePiece model ({_one_line(error)}); copy it again") from None
        self._sp = sp
        self.vocab_size = sp.vocab_size()
        ids = list(range(self.vocab_size))
        pieces: list[str] = sp.id_to_piece(ids)
        self.bos_token_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_token_id = sp.eos_id() if sp.eos_id() >= 0 else None
        self.special_token_ids = frozenset(i for i in ids if sp.is_control(i) or sp.is_unknown(i))
        self._bytes = {i: bytes([int(m[1], 16)]) for i in ids if sp.is_byte(i) and (m := _BYTE_PIECE.match(pieces[i]))}
        self._special = {pieces[i]: i for i in self.special_token_ids}
        self._split = re.compile("(" + "|".join(re.escape(piece) for piece in self._special) + ")")
        config = _tokenizer_config(file.parent)
        adds_bos = config.get("add_bos_token", True) and self.bos_token_id is not None
        self._prefix = [sp.bos_id()] if adds_bos else []
        names = {f"{name}_token": pieces[i] for name, i in (("bos", sp.bos_id()), ("eos", sp.eos_id())) if i >= 0}
        self._chat_template = ChatTemplate(file.parent, config, names)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
            else:
                ids += self._sp.encode(part)
        return ids

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._sp.decode(token_ids))

    def token_bytes(self, token_id: int) -> bytes | None:
        return self._bytes.get(token_id)


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, read by the tokenizers library."""

    def __init__(self, file: Path) -> None:
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{file}: is not a tokenizers file ({_one_line(error)}); copy it again") from None
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self.vocab_size = max([inner.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        config = _tokenizer_config(file.parent)
        self.bos_token_id = self._named(config.get("bos_token"), _BOS_NAMES)
        self.eos_token_id = self._named(config.get("eos_token"), _EOS_NAMES)
        starts_with_bos = inner.encode("a").ids[:1] == [self.bos_token_id]
        adds_bos = config.get("add_bos_token", starts_with_bos)
        self._prefix = [self.bos_token_id] if adds_bos and self.bos_token_id is not None else []
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        names = {name: str(inner.id_to_token(i)) for name, i in ids.items() if i is not None}
        self._chat_template = ChatTemplate(file.parent, config, names)
        decoders = _decoder_types(json.loads(inner.to_str()).get("decoder"))
        self.byte_mode = "all" if "ByteLevel" in decoders else "run"
        self._has_byte_fallback = "ByteFallback" in decoders

    def _named(self, value: Any, usual: tuple[str, ...]) -> int | None:
        """Id of the special token a tokenizer_config names, or of the first usual name that is special."""
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            token_id: int | None = self._inner.token_to_id(value)
            return token_id
        found = (self._inner.token_to_id(name) for name in usual)
        return next((i for i in found if i in self.special_token_ids), None)

    def _encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._inner.decode(token_ids, skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes | None:
        token = self._inner.id_to_token(token_id)
        if token is None:
            return None
        if self.byte_mode == "all":
            if all(character in _BYTE_OF_CHARACTER for character in token):
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            return token.encode()
        match = _BYTE_PIECE.fullmatch(token) if self._has_byte_fallback else None
        return bytes([int(match[1], 16)]) if match else None


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a model: `tokenizer.json` if there is one, else `tokenizer.model`, else None.

    `path` is a folder, one of the two files, or a checkpoint file with the tokenizer beside it. Raises ModelError when
    the path does not exist or the tokenizer is malformed. The source of a dummy checkpoint has none.
    """
    path = Path(path)
    if path == DUMMY_SOURCE:
        return None
    if path.suffix == ".model":
        return SentencePieceTokenizer(_existing(path))
    if path.suffix == ".json":
        return JsonTokenizer(_existing(path))
    folder = path if path.is_dir() else _existing(path).parent
    if (folder / JSON_FILE).is_file():
        return JsonTokenizer(folder / JSON_FILE)
    if (folder / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer(folder / SENTENCEPIECE_FILE)
    return None


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder; give the folder that holds the tokenizer")
    return path


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json_object(file) if file.is_file() else {}


def _decoder_types(decoder: Mapping[str, Any] | None) -> set[str]:
    """Types of a decoder and of those it chains."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_types(part) for part in decoder.get("decoders", [])))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
