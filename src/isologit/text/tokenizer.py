"""Text to token ids and back, from `tokenizer.json` or a SentencePiece `tokenizer.model`. Knows no model."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers

from isologit.config.model_config import read_json_object
from isologit.errors import ModelError, RequestError
from isologit.text.added_tokens import AddedTokens, TokenSplitter, read_added_tokens
from isologit.text.chat import ChatTemplate, ControlTokens

DUMMY_SOURCE = Path("<dummy>")  # stands for the folder of a checkpoint that comes from no file
JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_USUAL_NAMES = {  # where no file names them
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "unk_token": ("<unk>",),
}
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_LFS_POINTER = b"version https://git-lfs"
_WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # appended to a ModelProto: normalizer_spec.add_dummy_prefix = false

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
        return self._encode(_checked(text))

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
    def byte_value(self, token_id: int) -> bytes | None:
        """The bytes a token stands for (see `ByteMode`), or None for a token that stands for characters."""

    @abstractmethod
    def token_name(self, token_id: int) -> str:
        """How the vocabulary spells a token: `</s>`, `▁the`, `Ġthe`, `<0x0A>`; empty for ids outside of it."""

    def token_bytes(self, token_id: int) -> bytes:
        """Exactly what a token adds to a text that stands before it; of a special token, its name.

        Joined, the bytes of a text's tokens are the text in UTF-8. Empty for ids outside the vocabulary.
        """
        if not self.is_text(token_id):
            return self.token_name(token_id).encode()
        value = self.byte_value(token_id)
        return self.inner_text([token_id]).encode() if value is None else value

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token and its text to decode others behind, because what stands first loses its leading space."""
        for token_id in range(self.vocab_size):
            if self.is_text(token_id) and self.byte_value(token_id) is None:
                text = self._decode([token_id])
                if text.strip():
                    return token_id, text
        raise ModelError("the tokenizer has no token that stands for characters; use the model's own tokenizer")

    @cached_property
    def _inner_texts(self) -> dict[int, str]:
        return {}

    def inner_text(self, token_ids: list[int]) -> str:
        """Text of the ids where other text stands before them. Single ids are remembered."""
        if self.byte_mode == "all":  # nothing depends on what stands before
            return self.decode(token_ids)
        if len(token_ids) == 1 and (known := self._inner_texts.get(token_ids[0])) is not None:
            return known
        anchor, anchor_text = self._anchor
        text = self.decode([anchor, *token_ids])[len(anchor_text) :]
        if len(token_ids) == 1:
            self._inner_texts[token_ids[0]] = text
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as one prompt; encode it with `encode_without_bos`, since templates write the begin token.

        A message is `{"role": "user", "content": "..."}`; `continue_final_message` leaves the last one open, to be
        gone on with; `variables` are what else the template may read. May be called from any thread. Raises ModelError
        when the model has no usable template, RequestError when the template refuses the messages or breaks its limits
        of time, memory and size with them.
        """
        return self._chat_template.render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, plain_content: bool = False, **template: Any
    ) -> list[int]:
        """Token ids of the conversation; `template` are the keywords of `apply_chat_template`, and so are the errors.

        With `plain_content` only the template's own text may become control tokens: `</s>` in a message is encoded as
        the four characters that it is. Without, it ends the sequence, as in transformers and vLLM.
        """
        if not plain_content:
            return self.encode_without_bos(self.apply_chat_template(messages, **template))
        tokens = self._control_tokens
        for name in ("tools", "documents", "variables"):
            template[name] = tokens.mark(template.get(name))
        text = tokens.with_aliases(self.apply_chat_template([tokens.mark(message) for message in messages], **template))
        return self._encode_aliases(_checked(text))

    def check_chat_template(self) -> None:
        """Try the chat template, if there is one. Raises ModelError when it is malformed or breaks its limits."""
        self._chat_template.check()

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self._control_ids)

    @property
    @abstractmethod
    def _control_ids(self) -> dict[str, int]:
        """Control tokens by their text: special ones, and added ones that the chat template writes."""

    @abstractmethod
    def _encode_aliases(self, text: str) -> list[int]:
        """Token ids of a text in which control tokens are spelled by their aliases alone."""


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`, in the way of Hugging Face's original LLaMA tokenizer.

    Every stretch between special and added tokens begins with the space that SentencePiece puts first; with
    `"legacy": false` in `tokenizer_config.json` only the start of the text does, with `"add_prefix_space": false` none.
    """

    byte_mode: ByteMode = "each"

    def __init__(self, file: Path) -> None:
        data = _read(file)
        try:
            sp = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            if _TIKTOKEN_LINE.match(data):
                raise ModelError(
                    f"{file}: is a tiktoken vocabulary, as in Meta's own release of LLaMA 3, and not SentencePiece; "
                    "add the tokenizer.json of the Hugging Face release of the model"
                ) from None
            raise ModelError(f"{file}: is not a SentencePiece model ({_one_line(error)}); copy it again") from None
        config = _tokenizer_config(file.parent)
        bare = sentencepiece.SentencePieceProcessor(model_proto=data + _WITHOUT_DUMMY_PREFIX)
        self._first = bare if config.get("add_prefix_space") is False else sp
        self._later = sp if config.get("legacy") is not False and self._first is sp else bare
        ids = list(range(sp.vocab_size()))
        self._pieces: list[str] = sp.id_to_piece(ids)
        self._bytes = {
            i: bytes([int(m[1], 16)]) for i in ids if sp.is_byte(i) and (m := _BYTE_PIECE.match(self._pieces[i]))
        }
        self._added = {
            i: tokenizers.AddedToken(self._pieces[i], special=True, normalized=False)
            for i in ids
            if sp.is_control(i) or sp.is_unknown(i)
        }
        declared = read_added_tokens(file.parent, config)
        self._add(declared, file.parent)
        self.vocab_size = len(self._pieces)
        self.special_token_ids = frozenset(i for i, token in self._added.items() if token.special)
        roles = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
        names = {role: self._pieces[i] for role, i in roles.items() if i >= 0} | dict(declared.names)
        by_text = {token.content: i for i, token in self._added.items()}
        self.bos_token_id = by_text.get(names.get("bos_token", ""))
        self.eos_token_id = by_text.get(names.get("eos_token", ""))
        adds_bos = config.get("add_bos_token", True) and self.bos_token_id is not None
        self._prefix = [self.bos_token_id] if adds_bos and self.bos_token_id is not None else []
        self._chat_template = ChatTemplate(file.parent, config, names)
        self._splitter = TokenSplitter(self._added, {i: token.content for i, token in self._added.items()})

    def _add(self, declared: AddedTokens, folder: Path) -> None:
        """Take declared tokens into the vocabulary, at its end or where they are already."""
        ids = {piece: i for i, piece in enumerate(self._pieces)}
        numbered = [(i, token) for i, token in declared.tokens.items()]
        for wanted, token in [*numbered, *((None, token) for token in declared.unnumbered)]:
            given = ids.setdefault(token.content, len(self._pieces))
            if wanted not in (None, given):
                raise _wrong_id(folder, token.content, wanted, given)
            if given == len(self._pieces):
                self._pieces.append(token.content)
            self._added[given] = token

    def _encode(self, text: str) -> list[int]:
        return self._encode_split(self._splitter.split(text))

    def _encode_aliases(self, text: str) -> list[int]:
        return self._encode_split(self._alias_splitter.split(text))

    @cached_property
    def _alias_splitter(self) -> TokenSplitter:
        control = self._control_ids
        spelled = {i: ControlTokens.alias(i) if t.content in control else t.content for i, t in self._added.items()}
        return TokenSplitter(self._added, spelled)

    def _encode_split(self, parts: Iterator[str | int]) -> list[int]:
        ids: list[int] = []
        sp = self._first
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += sp.encode(part)
            sp = self._later
        return ids

    def _decode(self, token_ids: list[int]) -> str:
        if self._added.keys().isdisjoint(token_ids):
            return str(self._first.decode(token_ids))
        text, run = "", list[int]()
        for token_id in token_ids:
            if token_id not in self._added:
                run.append(token_id)
                continue
            text += self._decode_run(run, first=not text)
            text += self._added[token_id].content
            run.clear()
        return text + self._decode_run(run, first=not text)

    def _decode_run(self, run: list[int], *, first: bool) -> str:
        """Text of pieces in a row; only what stands first loses the space that stands for its start."""
        if not run:
            return ""
        if first:
            return str(self._first.decode(run))
        anchor, anchor_text = self._anchor
        return str(self._first.decode([anchor, *run]))[len(anchor_text) :]

    def byte_value(self, token_id: int) -> bytes | None:
        return self._bytes.get(token_id)

    def token_name(self, token_id: int) -> str:
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else ""

    @property
    def _control_ids(self) -> dict[str, int]:
        return _control_ids(self._added, self._chat_template.text)


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, read by the tokenizers library, with the tokens that the files beside it add."""

    def __init__(self, file: Path) -> None:
        data = _read(file)
        try:
            inner = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{file}: is not a tokenizers file ({_one_line(error)}); copy it again") from None
        inner.no_padding()
        inner.no_truncation()
        config = _tokenizer_config(file.parent)
        declared = read_added_tokens(file.parent, config)
        _add_to(inner, declared, file.parent)
        self._inner = inner
        self._added = inner.get_added_tokens_decoder()
        self.vocab_size = max([inner.get_vocab_size(with_added_tokens=False), *(i + 1 for i in self._added)])
        self.special_token_ids = frozenset(i for i, token in self._added.items() if token.special)
        names = {role: self._first_special(usual) for role, usual in _USUAL_NAMES.items()} | dict(declared.names)
        named = {role: name for role, name in names.items() if name is not None}
        self.bos_token_id = inner.token_to_id(named.get("bos_token", ""))
        self.eos_token_id = inner.token_to_id(named.get("eos_token", ""))
        starts_with_bos = inner.encode("a").ids[:1] == [self.bos_token_id]
        adds_bos = config.get("add_bos_token", starts_with_bos)
        self._prefix = [self.bos_token_id] if adds_bos and self.bos_token_id is not None else []
        self._chat_template = ChatTemplate(file.parent, config, named)
        decoders = _decoder_types(json.loads(inner.to_str()).get("decoder"))
        self.byte_mode = "all" if "ByteLevel" in decoders else "run"
        self._has_byte_fallback = "ByteFallback" in decoders

    def _first_special(self, usual: Sequence[str]) -> str | None:
        return next((name for name in usual if self._inner.token_to_id(name) in self.special_token_ids), None)

    def _encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def _encode_aliases(self, text: str) -> list[int]:
        aliases, ids = self._aliases
        return [ids.get(i, i) for i in aliases.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _aliases(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The same tokenizer with control tokens spelled by their aliases, and our ids for its added tokens."""
        spelling = json.loads(self._inner.to_str())
        spelling["post_processor"] = None
        control = self._control_ids
        for token in spelling["added_tokens"]:
            if token["content"] in control:
                token |= {"content": ControlTokens.alias(token["id"]), "normalized": False}
        aliases = tokenizers.Tokenizer.from_str(json.dumps(spelling))
        ids = {token["content"]: token["id"] for token in spelling["added_tokens"]}
        return aliases, {i: ids[token.content] for i, token in aliases.get_added_tokens_decoder().items()}

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._inner.decode(token_ids, skip_special_tokens=False))

    def byte_value(self, token_id: int) -> bytes | None:
        token = self._inner.id_to_token(token_id)
        if token is None:
            return None
        if self.byte_mode == "all":
            if all(character in _BYTE_OF_CHARACTER for character in token):
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            return token.encode()
        match = _BYTE_PIECE.fullmatch(token) if self._has_byte_fallback else None
        return bytes([int(match[1], 16)]) if match else None

    def token_name(self, token_id: int) -> str:
        return self._inner.id_to_token(token_id) or "" if 0 <= token_id < self.vocab_size else ""

    @property
    def _control_ids(self) -> dict[str, int]:
        return _control_ids(self._added, self._chat_template.text)


def _add_to(inner: tokenizers.Tokenizer, declared: AddedTokens, folder: Path) -> None:
    """Add declared tokens to the library's tokenizer, which numbers new ones from the end of its vocabulary."""
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    new = [token for token in declared.unnumbered if token.content not in known]
    inner.add_tokens([*declared.tokens.values(), *new])
    for wanted, token in declared.tokens.items():
        given = inner.token_to_id(token.content)
        if given != wanted:
            raise _wrong_id(folder, token.content, wanted, given)


def _wrong_id(folder: Path, token: str, wanted: int | None, given: int | None) -> ModelError:
    return ModelError(
        f'{folder}: the added token "{token}" is declared with id {wanted}, but the vocabulary gives it {given}; '
        "save the tokenizer again as tokenizer.json"
    )


def _control_ids(added: Mapping[int, tokenizers.AddedToken], template: str) -> dict[str, int]:
    return {
        token.content: i
        for i, token in added.items()
        if token.special or (token.content in template and not token.content.isspace())
    }


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


def _read(file: Path) -> bytes:
    """The bytes of a tokenizer's file. Raises ModelError when they cannot be read or are elsewhere."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from None
    if data.startswith(_LFS_POINTER):
        raise ModelError(f'{file}: is a Git LFS pointer to the file, not the file; fetch it with "git lfs pull"')
    return data


def _checked(text: str) -> str:
    """The text. Raises RequestError for lone surrogates, which JSON can write and no encoding holds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("the text is not valid Unicode (it holds a lone surrogate); send whole characters") from None
    return text


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
