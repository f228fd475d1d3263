"""The contest's logits files: their names, the positions they hold, writing and reading them.

A row is saved when the 0-based position of the last token fed is divisible by 100, as
`{unix time}_{key}_{position}.npy`. The key is the first 20 characters of all fed token ids written one after another:
as integers in the file of a prefill, as floats in that of a decode step (`1.020355.0915.0278.0`), because the contest's
baseline lets its ids become float64 there. Keys collide, so an `index.jsonl` of our own tells the files apart.
"""

from __future__ import annotations

import importlib
import json
import pickle
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from isologit.common.files import write_atomically
from isologit.errors import OutputFolderError
from isologit.fidelity.files import LogitsFileError
from isologit.fidelity.rows import CapturedRow

EVERY = 100
"""Positions between two saved rows."""

SIDECAR = "index.jsonl"

_KEY_LENGTH = 20
_NAME = re.compile(r"(?P<time>\d+(?:\.\d+)?)_(?P<key>[0-9.]+)_(?P<position>\d+)\.npy")
_PICKLED = {
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("copyreg", "_reconstructor"),
    ("builtins", "object"),
}


@dataclass(frozen=True)
class LogitsName:
    """The three parts of a file name: when (Unix seconds), which sentence, and after which position."""

    time: float
    key: str
    position: int

    @classmethod
    def parse(cls, name: str) -> LogitsName:
        """Raises LogitsFileError when the name is not of the contest's form."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise LogitsFileError(f"{name}: not a contest logits file; its name must be TIME_KEY_POSITION.npy")
        return cls(float(match["time"]), match["key"], int(match["position"]))

    def __str__(self) -> str:
        return f"{self.time!r}_{self.key}_{self.position}.npy"


def contest_positions(prompt_len: int, num_output_tokens: int) -> list[int]:
    """Output tokens (0-based) whose rows the contest saves; 0 is chosen by the prefill, every other by a decode step.

    Output token i is chosen by the row after position prompt_len - 1 + i (prompt_len counts BOS).
    """
    return list(range((1 - prompt_len) % EVERY, num_output_tokens, EVERY))


def sentence_key(fed_token_ids: Sequence[int], *, prefill: bool) -> str:
    """The key of the tokens fed so far. A prefill is padded with id 0, which shows when it is shorter than the key."""
    if prefill:
        return "".join(str(int(token)) for token in fed_token_ids[:_KEY_LENGTH])[:_KEY_LENGTH].ljust(_KEY_LENGTH, "0")
    return "".join(str(float(token)) for token in fed_token_ids[:_KEY_LENGTH])[:_KEY_LENGTH]


def write_contest_logits(folder: Path, rows: Iterable[CapturedRow]) -> list[Path]:
    """Write each row as a float32 (1, vocab) file, in the order given, and `index.jsonl`; returns the files.

    Times in the names are the time of writing, strictly increasing. Every row's position must be one the contest saves.
    Raises OutputFolderError when the folder already holds logits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.npy")):
        raise OutputFolderError(f"{folder} already holds .npy files; choose another folder or empty this one")
    written: list[Path] = []
    index: list[dict[str, Any]] = []
    now = 0.0
    for row in rows:
        assert row.position % EVERY == 0, f"{row.request_id}: position {row.position} is not one the contest saves"
        assert row.logits.dtype == np.float32
        now = max(time.time(), now + 1e-6)
        prefill = row.index == 0
        path = folder / str(LogitsName(now, sentence_key(row.fed_token_ids, prefill=prefill), row.position))
        _save(path, row.logits[None])
        written.append(path)
        index.append(
            {
                "file": path.name,
                "request_id": row.request_id,
                "position": row.position,
                "phase": "prefill" if prefill else "decode",
                "prompt_sha256": row.prompt_sha256,
                "context_sha256": row.context_sha256,
            }
        )
    lines = "".join(json.dumps(entry) + "\n" for entry in index)
    write_atomically(folder / SIDECAR, lambda path: path.write_text(lines, encoding="utf-8"))
    return written


def _save(path: Path, rows: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, numpy would add its own suffix
            np.save(file, rows)

    write_atomically(path, write)


def read_sidecar(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of `index.jsonl` by file name; empty when there is none. Raises LogitsFileError for a broken line."""
    path = folder / SIDECAR
    if not path.exists():
        return {}
    entries: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            entries[entry["file"]] = {
                "request_id": str(entry["request_id"]),
                "position": int(entry["position"]),
                "prompt_sha256": str(entry["prompt_sha256"]),
                "context_sha256": str(entry["context_sha256"]),
            }
        except (ValueError, KeyError, TypeError) as error:
            raise LogitsFileError(
                f"{path} line {number}: not an entry of a logits index; write it again, or delete it to pair by names"
            ) from error
    return entries


def read_contest_row(path: Path) -> np.ndarray:
    """The logits of one file as [vocab], in the dtype they were saved in; (1, vocab) and (1, 1, vocab) are one row.

    The contest's own files hold MindSpore tensors; they can be read where MindSpore can be imported. Raises
    LogitsFileError when the file is broken, needs MindSpore, or holds more than one row.
    """
    try:
        with path.open("rb") as file:
            array = _read_array(path, file)
    except (OSError, ValueError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise LogitsFileError(f"{path}: cannot be read ({error}); save it again") from error
    if array.ndim == 0 or array.size != array.shape[-1]:
        raise LogitsFileError(f"{path}: holds an array of shape {list(array.shape)}; one row of logits was expected")
    return array.reshape(-1)


def _read_array(path: Path, file: BinaryIO) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    dtype = header(file)[2]
    if not dtype.hasobject:
        file.seek(0)
        return np.asarray(np.load(file, allow_pickle=False))
    try:
        importlib.import_module("mindspore")
    except ImportError as error:
        raise LogitsFileError(
            f"{path}: holds MindSpore tensors, and MindSpore cannot be imported here; "
            "convert the files to plain float32 on a machine that has it"
        ) from error
    objects = _MindSporeUnpickler(file).load()
    return np.array([tensor.asnumpy() for tensor in objects.reshape(-1)], np.float32).reshape(objects.shape)


class _MindSporeUnpickler(pickle.Unpickler):
    """Makes arrays and MindSpore tensors and nothing else: a logits file must not be able to run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_tensor = name == "Tensor" and module.split(".")[0] == "mindspore"
        if not is_tensor and (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is no MindSpore tensor")
        return super().find_class(module, name)
