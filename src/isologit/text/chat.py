"""Chat templates: a conversation to one prompt, by the Jinja template a model folder brings along."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isologit.config.model_config import read_json_object
from isologit.errors import ModelError, RequestError
from isologit.text.chat_renderer import RenderError, renderer

_FILE = "chat_template.jinja"
_FOLDER = "additional_chat_templates"
_PROCESSOR_FILE = "chat_template.json"
_DEFAULT = "default"
_FOR_TOOLS = "tool_use"
_NEVER_FITS = "use another chat template, or give a plain prompt instead of messages"
_TO_CONTINUE = "\U000f0004 "  # stands at the end of the message that the model goes on with
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first two
_TRIALS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ],
)

Message = Mapping[str, Any]


class ChatTemplate:
    """The templates of a folder, by name; most have one, "default".

    `variables` are what a template may read beside the conversation: the texts of special tokens by name
    (`bos_token`, `unk_token`, ...).
    """

    def __init__(self, folder: Path, tokenizer_config: Mapping[str, Any], variables: Mapping[str, str]) -> None:
        self._folder = folder
        self._variables = dict(variables)
        self._sources = _sources(folder, tokenizer_config)

    @property
    def text(self) -> str:
        """All that the templates say, to look for tokens in."""
        return "\n".join(self._sources.values())

    def check(self) -> None:
        """Render short conversations. Raises ModelError for a template that is malformed or breaks a limit."""
        for source in self._sources.values():
            for messages in _TRIALS:
                try:
                    renderer.render(source, self._values(messages, None, None, True, {}))
                except RenderError as error:
                    if error.kind != "refused":  # it may want other messages, or tools
                        raise self._unusable(error) from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Arguments mean what they mean in transformers' `apply_chat_template`; `variables` are its kwargs.

        Raises ModelError without a usable template, RequestError when the template refuses the conversation or breaks
        a limit with it.
        """
        source = self._source(tools)
        if not messages:
            raise RequestError("the conversation is empty; give at least one message")
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: "
                "a message is continued, or a new one begun"
            )
        chat = [_with_reasoning({k: v for k, v in message.items() if v is not None}) for message in messages]
        final = _mark_final(chat) if continue_final_message else ""
        try:
            values = self._values(chat, tools, documents, add_generation_prompt, variables or {})
            text = renderer.render(source, values)
        except RenderError as error:
            if error.kind == "malformed":
                raise self._unusable(error) from None
            if error.kind == "limit":
                raise RequestError(f"with these messages the model's chat template {error}; send less") from None
            raise RequestError(f"the model's chat template does not accept these messages: {error}") from None
        return _cut(text, final) if continue_final_message else text

    def _values(
        self, messages: Sequence[Message], tools: Any, documents: Any, add_generation_prompt: bool, others: Message
    ) -> dict[str, Any]:
        return {
            **self._variables,
            **others,
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }

    def _source(self, tools: Any) -> str:
        if not self._sources:
            raise ModelError(f"{self._folder}: the model has no chat template; give a plain prompt instead of messages")
        name = _FOR_TOOLS if tools is not None and _FOR_TOOLS in self._sources else _DEFAULT
        if name not in self._sources:
            names = ", ".join(sorted(self._sources))
            raise ModelError(f"{self._folder}: none of the chat templates ({names}) is called default; {_NEVER_FITS}")
        return self._sources[name]

    def _unusable(self, error: RenderError) -> ModelError:
        if error.kind == "malformed":
            return ModelError(f"{self._folder}: the chat template is malformed ({error}); {_NEVER_FITS}")
        return ModelError(f"{self._folder}: the chat template {error}; {_NEVER_FITS}")


def _sources(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: of files of their own, else of `tokenizer_config.json`, else of a processor's file."""
    files = {_DEFAULT: folder / _FILE} if (folder / _FILE).is_file() else {}
    files |= {file.name.removesuffix(".jinja"): file for file in sorted((folder / _FOLDER).glob("*.jinja"))}
    if files:
        return {name: _read(file) for name, file in files.items()}
    given = tokenizer_config.get("chat_template")
    if given is None and (folder / _PROCESSOR_FILE).is_file():
        given = read_json_object(folder / _PROCESSOR_FILE).get("chat_template")
    if isinstance(given, list):
        given = {item.get("name"): item.get("template") for item in given if isinstance(item, dict)}
    named = given if isinstance(given, dict) else {} if given is None else {_DEFAULT: given}
    for name, source in named.items():
        if not (isinstance(name, str) and isinstance(source, str)):
            raise ModelError(f"{folder}: chat_template must be text, or several by name; copy the tokenizer again")
    return named


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ModelError(f"{file}: cannot be read as UTF-8 text; copy it again") from None


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_final(chat: list[dict[str, Any]]) -> str:
    """Mark where the last message's text ends, in place; returns that text."""
    content = chat[-1].get("content")
    if isinstance(content, list):
        content = chat[-1]["content"] = [dict(part) if isinstance(part, Mapping) else part for part in content]
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text = part["text"]
                part["text"] = text + _TO_CONTINUE
                return str(text)
    if not isinstance(content, str):
        raise RequestError("continue_final_message is set, but the last message has no text to continue")
    chat[-1]["content"] = content + _TO_CONTINUE
    return content


def _cut(text: str, final: str) -> str:
    """The prompt up to the end of the last message's text."""
    end = text.rfind(_TO_CONTINUE.strip())
    if end < 0 or final.strip() not in text:
        raise RequestError("continue_final_message is set, but the chat template does not write the last message whole")
    kept = text[:end]
    return kept if text.startswith(_TO_CONTINUE, end) else kept.rstrip()


class ControlTokens:
    """Tells the control tokens that a template writes from those that a conversation's own text spells.

    A text of a conversation is marked before rendering; afterwards the template's own control tokens become aliases,
    which nothing else spells, and a tokenizer that knows only aliases encodes the rest as plain text. Marks and aliases
    are made of private-use characters, which are dropped from the conversation.
    """

    _START, _END, _LEFT, _RIGHT = "\U000f0000", "\U000f0001", "\U000f0002", "\U000f0003"
    _OURS = re.compile(f"[{_START}{_END}{_LEFT}{_RIGHT}]")

    def __init__(self, ids: Mapping[str, int]) -> None:
        """`ids` are those of all control tokens by their text."""
        self._ids = dict(ids)
        longest_first = sorted(self._ids, key=len, reverse=True)
        any_token = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._token = re.compile(any_token)
        self._found = re.compile(f"{self._START}({any_token}){self._END}|[{self._START}{self._END}]|({any_token})")

    @classmethod
    def alias(cls, token_id: int) -> str:
        """What stands for a control token where a template wrote it."""
        return f"{cls._LEFT}{token_id}{cls._RIGHT}"

    def mark(self, value: Any) -> Any:
        """A conversation's value, its texts marked; keys of objects are left as they are."""
        if isinstance(value, str):
            return self._token.sub(f"{self._START}\\g<0>{self._END}", self._OURS.sub("", value))
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.mark(item) for item in value]
        return value

    def with_aliases(self, rendered: str) -> str:
        """The rendered prompt with aliases for the template's own control tokens, and without marks."""
        return self._found.sub(lambda found: self.alias(self._ids[found[2]]) if found[2] else found[1] or "", rendered)
