"""Reading prompt and replay files: bytes to text, text to lines, lines to JSON values. Knows no records."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isologit.errors import DatasetError

_GZIP = b"\x1f\x8b"
_OTHER_ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"7z\xbc": "7z",
}
_MARKS = (  # the longest first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LARGEST_INTEGER = 2**31 - 1  # of token ids and lengths


class MalformedJSON(ValueError):
    """A text that is no JSON; the message is one line. `at` is the line and column, where they are known."""

    def __init__(self, reason: str, at: tuple[int, int] | None = None) -> None:
        super().__init__(reason if at is None else f"malformed JSON at column {at[1]} ({reason})")
        self.reason = reason
        self.at = at


class Object(dict[str, Any]):
    """A JSON object that knows which of its keys appeared twice."""

    repeated: str | None = None


def read_text(path: Path) -> str:
    """The file as text: UTF-8, or UTF-16 and UTF-32 by their byte order mark, unpacked if it is gzip.

    Raises DatasetError when it is missing, empty, a folder, or cannot be read as text.
    """
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise DatasetError(f"{path}: this is a folder; give a prompt file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DatasetError(f"{path}: the gzip file is damaged; copy it again") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise DatasetError(f"{str(path)!r}: is no path; check it") from None
    for start, kind in _OTHER_ARCHIVES.items():
        if data.startswith(start):
            raise DatasetError(f"{path}: this is a {kind} archive; unpack it first (gzip is read as it is)")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        name = encoding.removesuffix("-sig").upper()
        raise DatasetError(f"{path}:{line}: not {name} at byte {error.start}; save the file as UTF-8") from None
    if not text.strip():
        raise DatasetError(f"{path}: the file is empty; give at least one prompt")
    if (position := text.find("\0")) >= 0:
        line = text.count("\n", 0, position) + 1
        raise DatasetError(f"{path}:{line}: holds NUL bytes, as UTF-16 does; save the file as UTF-8")
    return text


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines by their number from 1, without blank ones.

    They end at LF or CR LF only: what else cuts lines elsewhere (U+2028, form feed, ...) may be part of a prompt.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def json_value(text: str) -> Any:
    """The value of a JSON text, objects as `Object`; an integer with too many digits to read is infinite.

    Raises MalformedJSON, also for values nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise MalformedJSON(error.msg, (error.lineno, error.colno)) from None
    except RecursionError:
        raise MalformedJSON("the JSON is nested too deeply") from None


def shown(value: Any) -> str:
    """A JSON value in a message: short, on one line, in ASCII."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if value in (math.inf, -math.inf):
        return "a number that is infinite or too long to read"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON can write and no encoding holds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_integer(value: Any, least: int) -> bool:
    """Whether a JSON value is an integer (true and false are not) from `least` to 2**31 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_INTEGER


def _object(pairs: list[tuple[str, Any]]) -> Object:
    result = Object(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        result.repeated = next(key for key in keys if keys.count(key) > 1)
    return result


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # Python reads 4300 digits at most
        return float(digits)
