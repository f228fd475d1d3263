"""Prompt files: the contest's Alpaca JSON, JSONL, or plain lines of text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from isologit.errors import DatasetError, RequestError
from isologit.workload.requests import BadRequest, RequestSpec, TextEncoder
from isologit.workload.text_file import (
    MalformedJSON,
    Object,
    is_integer,
    is_unicode,
    json_value,
    lines,
    read_text,
    shown,
)

Record = RequestSpec | BadRequest
DatasetFormat = Literal["auto", "alpaca", "jsonl", "text"]
_SAY_SO = "say --dataset-format text if its lines are prompts"
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)


def load_dataset(
    path: str | Path,
    tokenizer: TextEncoder | None,
    *,
    limit: int | None = None,
    default_max_new_tokens: int = 128,
    format: DatasetFormat = "auto",
) -> list[Record]:
    """Read the first `limit` records of a prompt file.

    A JSON list holds Alpaca records (`instruction`, `input`, `output`); lines that are JSON objects hold `prompt` or
    `prompt_token_ids`, and optionally `id` and `max_new_tokens`; other lines are prompts. Raises DatasetError when the
    file as a whole cannot be used; a bad record becomes a `BadRequest`.
    """
    path = Path(path)
    text = read_text(path)
    if format == "auto":
        format = _told_from(text)
    elif format not in get_args(DatasetFormat):
        raise DatasetError(f'dataset format "{format}" is unknown; use one of {", ".join(get_args(DatasetFormat))}')
    if format == "alpaca":
        records = list(_alpaca(path, text, tokenizer, limit))
    elif format == "jsonl":
        records = list(_jsonl(path, text, limit, default_max_new_tokens))
    else:
        records = list(_lines(path, text, limit, default_max_new_tokens))
    if not records:
        raise DatasetError(f"{path}: the file holds no prompts; give at least one")
    _refuse_duplicates(path, records)
    if all(isinstance(record, BadRequest) for record in records):
        first = records[0]
        assert isinstance(first, BadRequest)
        raise DatasetError(
            f"{path}: none of its {len(records)} records can be run; the first: {first.where}: {first.error}"
        )
    return records


def _told_from(text: str) -> DatasetFormat:
    """JSON only where the file is JSON, or meant to be: `[INST] ...`, `[1] ...` and `{name} ...` are text."""
    if text.lstrip().startswith("["):
        return "alpaca" if _is_list(text.lstrip()) else "text"
    every = (line.strip() for _, line in lines(text))
    first = next(every)
    if first.startswith("{"):
        return "jsonl" if _is_object(first, text) else "text"
    if first.startswith("#"):  # comments above JSONL
        below = next((line for line in every if not line.startswith("#")), "")
        if below.startswith("{") and _has_prompt(below):
            return "jsonl"
    return "text"


def _is_list(text: str) -> bool:
    """Whether a text that begins with a bracket is a JSON list, or one that is malformed or cut short."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        first = len(text) - len(text[1:].lstrip())
        return not (error.msg == "Expecting value" and error.pos == first < len(text))
    except (RecursionError, ValueError):
        return True
    return not text[end:].strip() or any(isinstance(item, dict) for item in value)


def _is_object(line: str, text: str) -> bool:
    """Whether a first line that begins with a brace is a JSON object, or one that is malformed or goes on below."""
    try:
        _, end = json.JSONDecoder().raw_decode(line)
    except json.JSONDecodeError as error:
        if line == "{":
            return text.lstrip()[1:].lstrip()[:1] in ('"', "}")
        return not error.msg.startswith("Expecting property name") or line[1:].lstrip()[:1] in ("", "'")
    except (RecursionError, ValueError):
        return True
    return line[end:].lstrip()[:1] in ("", ",", "{", "}", "]")


def _has_prompt(line: str) -> bool:
    try:
        value = json_value(line)
    except MalformedJSON:
        return False
    return isinstance(value, Object) and ("prompt" in value or "prompt_token_ids" in value)


def _alpaca(path: Path, text: str, tokenizer: TextEncoder | None, limit: int | None) -> Iterator[Record]:
    values = _items(path, text)
    if tokenizer is None:
        raise DatasetError(f"{path}: Alpaca records need a tokenizer to count the answer's tokens; give --tokenizer")
    for number, value in enumerate(values[:limit]):
        where = f"{path}: record {number}"
        try:
            yield _alpaca_record(value, str(number), where, tokenizer)
        except (MalformedJSON, RequestError) as error:
            yield BadRequest(str(number), where, str(error))


def _alpaca_record(value: Any, name: str, where: str, tokenizer: TextEncoder) -> Record:
    if isinstance(value, MalformedJSON):
        raise value
    if not isinstance(value, Object):
        return BadRequest(name, where, "the record is not an object with instruction, input and output")
    if value.repeated is not None:
        return BadRequest(name, where, f"the key {shown(value.repeated)} appears twice; keep one")
    for key in ("instruction", "input", "output"):
        field = value.get(key)
        if field is None and key == "input":
            continue
        if not isinstance(field, str):
            return BadRequest(name, where, f"{key} must be text, not {shown(field)}")
        if not is_unicode(field):
            return BadRequest(name, where, f"{key} is not valid Unicode (it holds a lone surrogate)")
    instruction, extra, output = value["instruction"], value.get("input"), value["output"]
    prompt = f"{instruction}:{extra}" if extra else instruction
    if not prompt:
        return BadRequest(name, where, "the prompt is empty; fill instruction")
    count = len(tokenizer.encode_without_bos(output))
    if count == 0:
        return BadRequest(name, where, "output is empty, so there is nothing to generate", prompt)
    return RequestSpec(name, prompt, None, count, where)


def _items(path: Path, text: str) -> list[Any]:
    """The items of a JSON list; one that cannot be read is a MalformedJSON in its place."""
    try:
        values = json_value(text)
    except MalformedJSON as error:
        if error.at is None:  # one item is at fault
            return [_value_or_error(item) for item in _cut_items(text)]
        line, column = error.at
        raise DatasetError(f"{path}:{line}:{column}: malformed JSON ({error.reason}); {_SAY_SO}") from None
    if not isinstance(values, list):
        raise DatasetError(f"{path}: Alpaca JSON is a list of records, not {shown(values)}; {_SAY_SO}")
    return values


def _value_or_error(text: str) -> Any:
    try:
        return json_value(text)
    except MalformedJSON as error:
        return error


def _cut_items(text: str) -> Iterator[str]:
    """Texts of the items of a JSON list, found by its brackets alone; what is left over is one more."""
    depth = start = 0
    for token in _JSON_TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if token[0] == "[" and depth == 1:
            start = token.end()
        elif (token[0] == "," and depth == 1) or depth == 0:
            yield text[start : token.start()]
            start = token.end()
            if depth == 0:
                break
    if text[start:].strip():
        yield text[start:]


def _jsonl(path: Path, text: str, limit: int | None, default_max_new_tokens: int) -> Iterator[Record]:
    if text.lstrip().startswith("{") and text.strip().count("\n") and _is_one_object(text):
        raise DatasetError(f"{path}: is one JSON object over several lines; give one object a line, or a list")
    found = 0
    for line_number, line in lines(text):
        if line.startswith("#"):
            continue
        if limit is not None and found >= limit:
            return
        where = f"{path}:{line_number}"
        try:
            value = json_value(line)
        except MalformedJSON as error:
            yield BadRequest(str(found), where, str(error))
        else:
            yield _from_object(value, str(found), where, default_max_new_tokens)
        found += 1


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(json_value(text), Object)
    except MalformedJSON:
        return False


def _from_object(value: Any, default_id: str, where: str, default_max_new_tokens: int) -> Record:
    if not isinstance(value, Object):
        return BadRequest(default_id, where, "the line is not a JSON object with prompt or prompt_token_ids")
    if value.repeated is not None:
        return BadRequest(default_id, where, f"the key {shown(value.repeated)} appears twice; keep one")
    given = value.get("id", default_id)
    if not isinstance(given, str | int) or isinstance(given, bool):
        return BadRequest(default_id, where, f"id must be text or an integer, not {shown(given)}")
    name = str(given)
    if not is_unicode(name):
        return BadRequest(default_id, where, "id is not valid Unicode (it holds a lone surrogate)")
    prompt, ids = value.get("prompt"), value.get("prompt_token_ids")
    if isinstance(prompt, str) and not is_unicode(prompt):
        return BadRequest(name, where, "prompt is not valid Unicode (it holds a lone surrogate)")
    text = prompt if isinstance(prompt, str) else None
    count = value.get("max_new_tokens", default_max_new_tokens)
    if not is_integer(count, least=1):
        why = f"max_new_tokens must be a whole number below 2**31 and at least 1, not {shown(count)}"
        return BadRequest(name, where, why, text)
    if ids is not None:
        if not isinstance(ids, list) or not all(is_integer(i, least=0) for i in ids):
            return BadRequest(name, where, "prompt_token_ids must be a list of integers from 0 to 2**31 - 1", text)
        if not ids:
            return BadRequest(name, where, "prompt_token_ids is empty; give at least one token", text)
        return RequestSpec(name, text, ids, count, where)
    if text is None:
        return BadRequest(name, where, f"needs prompt (text, not {shown(prompt)}) or prompt_token_ids")
    if not text:
        return BadRequest(name, where, "the prompt is empty; give at least one character")
    return RequestSpec(name, text, None, count, where)


def _lines(path: Path, text: str, limit: int | None, default_max_new_tokens: int) -> Iterator[Record]:
    if "\r" in text.strip() and "\n" not in text:
        raise DatasetError(f"{path}: its lines end in CR alone; save it with LF or CR LF")
    for index, (line_number, line) in enumerate(lines(text)):
        if limit is not None and index >= limit:
            return
        yield RequestSpec(str(index), line, None, default_max_new_tokens, f"{path}:{line_number}")


def _refuse_duplicates(path: Path, records: list[Record]) -> None:
    places: dict[str, str] = {}
    for record in records:
        if record.id in places:
            raise DatasetError(
                f"{path}: id {shown(record.id)} appears twice, at {places[record.id]} and {record.where}; "
                "make ids unique"
            )
        places[record.id] = record.where
