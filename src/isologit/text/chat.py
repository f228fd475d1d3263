"""Chat templates: a conversation to one prompt, by the Jinja template a model folder brings along."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isologit.errors import ModelError, RequestError

_FILE = "chat_template.jinja"


class ChatTemplate:
    """The template of a folder (`chat_template.jinja`, or `chat_template` in `tokenizer_config.json`), if it has one.

    `names` are the texts of special tokens a template may write: `bos_token`, `eos_token`.
    """

    def __init__(self, folder: Path, tokenizer_config: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self._folder = folder
        self._names = dict(names)
        self._source = _source(folder, tokenizer_config)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Raises ModelError without a usable template, RequestError when the template refuses the messages."""
        if self._source is None:
            raise ModelError(f"{self._folder}: the model has no chat template; give a plain prompt instead of messages")
        try:
            template = _environment().from_string(self._source)
        except jinja2.TemplateError as error:
            raise ModelError(f"{self._folder}: the chat template is malformed ({error})") from None
        try:
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._names)
        except (jinja2.TemplateError, TypeError) as error:
            raise RequestError(f"the model's chat template does not accept these messages: {error}") from None


def _source(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    if (folder / _FILE).is_file():
        return (folder / _FILE).read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face promises to templates: these whitespace rules, loop controls and helpers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
