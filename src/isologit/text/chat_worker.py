"""A process that renders chat templates: one JSON object a line in, one out. Knows nothing else of this package.

A template is a program that came with a model, so it runs here, where the kernel bounds its memory and its processor
time, and not in the process that serves. The Jinja environment is the one transformers gives its templates.

    python -P chat_worker.py CPU_SECONDS MEMORY_BYTES MAX_CHARACTERS

A request is `{"source", "variables"}`; an answer is `{"text"}`, or `{"failure": "malformed" | "refused" | "limit",
"message"}`. A template that uses up its processor time ends the process by SIGPROF.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LONGEST_MESSAGE = 500  # characters of a failure that are passed on


def main(cpu_seconds: float, memory_bytes: int, max_characters: int) -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; its end closes our input
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; the one on time remains
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        answer = _answer(line, memory_bytes, max_characters)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        sys.stdout.buffer.flush()


def _answer(line: bytes, memory_bytes: int, max_characters: int) -> dict[str, str]:
    try:
        request = json.loads(line.decode("utf-8", "surrogatepass"))
        try:
            template = _compiled(request["source"])
        except jinja2.TemplateSyntaxError as error:
            return _failure("malformed", f"line {error.lineno}: {error.message}")
        pieces: list[str] = []
        size = 0
        for piece in template.generate(**request["variables"]):
            pieces.append(piece)
            size += len(piece)
            if size > max_characters:
                return _failure("limit", f"writes more than {max_characters} characters")
        return {"text": "".join(pieces)}
    except MemoryError:
        return _failure("limit", f"needs more than {memory_bytes >> 20} MiB of memory")
    except RecursionError:
        return _failure("limit", "calls itself without end, or is nested too deeply")
    except Exception as error:  # whatever a template does wrong is said, not raised
        return _failure("refused", str(error) or type(error).__name__)


def _failure(kind: str, message: str) -> dict[str, str]:
    return {"failure": kind, "message": " ".join(message[:_LONGEST_MESSAGE].split())}


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face promises to templates: these whitespace rules, tags, filters and functions."""
    result = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    result.filters["tojson"] = _to_json
    result.globals["raise_exception"] = _raise
    result.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    result.globals["dict"] = _Dict()
    result.globals["namespace"] = _Namespace
    return result


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant wrote, for training; here it is its own content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace`, which takes no names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with an underscore: {name}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
