"""Replay files: recorded output tokens by request id, to force the output while doing all the computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isologit.errors import DatasetError
from isologit.workload.requests import TextEncoder
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


def load_replay(path: str | Path, tokenizer: TextEncoder | None) -> dict[str, list[int]]:
    """Output tokens by request id from JSONL records with `token_ids`, `text`, or one key that ends in `_text`.

    Text is encoded so that decoding gives exactly the recorded text. Records with an `error` are skipped. Raises
    DatasetError naming the line for anything else.
    """
    path = Path(path)
    recorded: dict[str, list[int]] = {}
    for number, line in lines(read_text(path)):
        where = f"{path}:{number}"
        try:
            value = json_value(line)
        except MalformedJSON as error:
            raise DatasetError(f"{where}: {error}") from None
        if not isinstance(value, Object) or "id" not in value:
            raise DatasetError(f"{where}: a replay record is a JSON object with id and token_ids or text")
        if value.repeated is not None:
            raise DatasetError(f"{where}: the key {shown(value.repeated)} appears twice; keep one")
        if not isinstance(value["id"], str | int) or isinstance(value["id"], bool):
            raise DatasetError(f"{where}: id must be text or an integer, not {shown(value['id'])}")
        if value.get("error"):
            continue
        name = str(value["id"])
        if name in recorded:
            raise DatasetError(f"{where}: id {shown(name)} appears twice; make ids unique")
        recorded[name] = _tokens(value, where, tokenizer)
    if not recorded:
        raise DatasetError(f"{path}: the file holds no recorded outputs")
    return recorded


def _tokens(value: dict[str, Any], where: str, tokenizer: TextEncoder | None) -> list[int]:
    ids = value.get("token_ids")
    if ids is not None:
        if not isinstance(ids, list) or not all(is_integer(i, least=0) for i in ids):
            raise DatasetError(f"{where}: token_ids must be a list of integers from 0 to 2**31 - 1")
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
    if not is_unicode(text):
        raise DatasetError(f"{where}: {key} is not valid Unicode (it holds a lone surrogate); record token_ids instead")
    # Decoding strips one leading space; a text that begins with spaces needs one more to survive it.
    for candidate in (text, f" {text}"):
        ids = tokenizer.encode_without_bos(candidate)
        if tokenizer.decode(ids) == text:
            return ids
    raise DatasetError(f"{where}: the recorded text does not survive encoding and decoding; record token_ids instead")
