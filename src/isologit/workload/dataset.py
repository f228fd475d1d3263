"""Prompt files: the contest's Alpaca JSON, JSONL, or plain lines of text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isologit.errors import DatasetError
from isologit.workload.requests import BadRequest, RequestSpec, TextEncoder

Record = RequestSpec | BadRequest


def load_dataset(
    path: str | Path, tokenizer: TextEncoder | None, *, limit: int | None = None, default_max_new_tokens: int = 128
) -> list[Record]:
    """Read the first `limit` records of a prompt file.

    A JSON list holds Alpaca records (`instruction`, `input`, `output`); lines that are JSON objects hold `prompt` or
    `prompt_token_ids`, and optionally `id` and `max_new_tokens`; other lines are prompts. Raises DatasetError when the
    file as a whole cannot be used; a bad record becomes a `BadRequest`.
    """
    path = Path(path)
    text = read_text(path)
    start = text.lstrip()[:1]
    if start == "[":
        records = list(_alpaca(path, text, tokenizer, limit))
    elif start == "{":
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


def read_text(path: Path) -> str:
    """The file as UTF-8 text. Raises DatasetError when it is missing, empty, a folder, or in another encoding."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise DatasetError(f"{path}: this is a folder; give a prompt file") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from None
    if not data.strip():
        raise DatasetError(f"{path}: the file is empty; give at least one prompt")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DatasetError(f"{path}:{line}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _alpaca(path: Path, text: str, tokenizer: TextEncoder | None, limit: int | None) -> Iterator[Record]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}:{error.lineno}:{error.colno}: malformed JSON ({error.msg})") from None
    if tokenizer is None:
        raise DatasetError(f"{path}: Alpaca records need a tokenizer to count the answer's tokens; give --tokenizer")
    for number, value in enumerate(values[:limit]):
        where = f"{path}: record {number}"
        if not isinstance(value, dict):
            yield BadRequest(str(number), where, "the record is not an object with instruction, input and output")
            continue
        instruction, extra, output = value.get("instruction"), value.get("input") or "", value.get("output")
        if not (isinstance(instruction, str) and isinstance(extra, str) and isinstance(output, str)):
            yield BadRequest(str(number), where, "instruction and output must be text")
            continue
        prompt = f"{instruction}:{extra}" if extra else instruction
        count = len(tokenizer.encode_without_bos(output))
        if not prompt:
            yield BadRequest(str(number), where, "the prompt is empty; fill instruction")
        elif count == 0:
            yield BadRequest(str(number), where, "output is empty, so there is nothing to generate", prompt)
        else:
            yield RequestSpec(str(number), prompt, None, count, where)


def _jsonl(path: Path, text: str, limit: int | None, default_max_new_tokens: int) -> Iterator[Record]:
    found = 0
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if limit is not None and found >= limit:
            return
        where = f"{path}:{line_number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield BadRequest(str(found), where, f"malformed JSON at column {error.colno} ({error.msg})")
        else:
            yield _from_object(value, str(found), where, default_max_new_tokens)
        found += 1


def _from_object(value: Any, default_id: str, where: str, default_max_new_tokens: int) -> Record:
    if not isinstance(value, dict):
        return BadRequest(default_id, where, "the line is not a JSON object with prompt or prompt_token_ids")
    given = value.get("id", default_id)
    if not isinstance(given, str | int) or isinstance(given, bool):
        return BadRequest(default_id, where, "id must be text or an integer")
    name = str(given)
    prompt, ids = value.get("prompt"), value.get("prompt_token_ids")
    shown = prompt if isinstance(prompt, str) else None
    count = value.get("max_new_tokens", default_max_new_tokens)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return BadRequest(name, where, f"max_new_tokens must be a whole number of at least 1, not {count!r}", shown)
    if ids is not None:
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            return BadRequest(name, where, "prompt_token_ids must be a list of integers", shown)
        if not ids:
            return BadRequest(name, where, "prompt_token_ids is empty; give at least one token", shown)
        return RequestSpec(name, shown, ids, count, where)
    if not isinstance(prompt, str):
        return BadRequest(name, where, "prompt (text) or prompt_token_ids is missing")
    if not prompt:
        return BadRequest(name, where, "the prompt is empty; give at least one character")
    return RequestSpec(name, prompt, None, count, where)


def _lines(path: Path, text: str, limit: int | None, default_max_new_tokens: int) -> Iterator[Record]:
    found = 0
    for line_number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if limit is not None and found >= limit:
            return
        yield RequestSpec(str(found), line.strip(), None, default_max_new_tokens, f"{path}:{line_number}")
        found += 1


def _refuse_duplicates(path: Path, records: list[Record]) -> None:
    places: dict[str, str] = {}
    for record in records:
        if record.id in places:
            raise DatasetError(
                f'{path}: id "{record.id}" appears twice, at {places[record.id]} and {record.where}; make ids unique'
            )
        places[record.id] = record.where
