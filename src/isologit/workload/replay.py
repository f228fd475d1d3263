"""Replay files: recorded output tokens by request id, to force the output while doing all the computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isologit.errors import DatasetError
from isologit.workload.dataset import read_text
from isologit.workload.requests import TextEncoder


def load_replay(path: str | Path, tokenizer: TextEncoder | None) -> dict[str, list[int]]:
    """Output tokens by request id from JSONL records with `token_ids`, `text`, or one key that ends in `_text`.

    Text is encoded so that decoding gives exactly the recorded text. Records with an `error` are skipped. Raises
    DatasetError naming the line for anything else.
    """
    path = Path(path)
    recorded: dict[str, list[int]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{where}: malformed JSON at column {error.colno} ({error.msg})") from None
        if not isinstance(value, dict) or "id" not in value:
            raise DatasetError(f"{where}: a replay record is a JSON object with id and token_ids or text")
        if value.get("error"):
            continue
        name = str(value["id"])
        if name in recorded:
            raise DatasetError(f'{where}: id "{name}" appears twice; make ids unique')
        recorded[name] = _tokens(value, where, tokenizer)
    if not recorded:
        raise DatasetError(f"{path}: the file holds no recorded outputs")
    return recorded


def _tokens(value: dict[str, Any], where: str, tokenizer: TextEncoder | None) -> list[int]:
    ids = value.get("token_ids")
    if ids is not None:
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise DatasetError(f"{where}: token_ids must be a list of integers")
        return ids
    keys = [key for key in value if key == "text" or key.endswith("_text")]
    key = "text" if "text" in keys else keys[0] if len(keys) == 1 else None
    if key is None or not isinstance(value[key], str):
        raise DatasetError(f"{where}: needs token_ids, text, or one key that ends in _text")
    if tokenizer is None:
        raise DatasetError(f"{where}: replaying text needs a tokenizer; give --tokenizer")
    text = value[key]
    if not text:
        return []
    # Decoding strips one leading space; a text that begins with spaces needs one more to survive it.
    for candidate in (text, f" {text}"):
        ids = tokenizer.encode_without_bos(candidate)
        if tokenizer.decode(ids) == text:
            return ids
    raise DatasetError(f"{where}: the recorded text does not survive encoding and decoding; record token_ids instead")
