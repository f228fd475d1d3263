"""Our own file of captured logits rows: one safetensors file, so that it is mapped, typed and checked on opening.

Tensors: `rows` float32 [n, vocab], and int64 [n] `output_indices`, `positions` and `token_ids` (the tokens the rows
chose). Metadata: `format`, and as JSON lists of n strings `request_ids`, `prompt_sha256`, `context_sha256`; the rest
is the writer's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from isologit.common.files import write_atomically
from isologit.common.safetensors_errors import safetensors_as_os_errors
from isologit.fidelity.files import LogitsFileError
from isologit.fidelity.rows import CapturedRow

CAPTURES = "captures.safetensors"
"""Name of the file in a run's output folder."""

_FORMAT = "isologit captures 1"
_ARRAYS = ("rows", "output_indices", "positions", "token_ids")
_STRINGS = ("request_ids", "prompt_sha256", "context_sha256")


@dataclass(frozen=True)
class Captures:
    """A captures file in memory; entry i of every list and array belongs to row i."""

    rows: np.ndarray  # float32 [n, vocab]
    output_indices: np.ndarray  # int64 [n]
    positions: np.ndarray  # int64 [n]
    token_ids: np.ndarray  # int64 [n]
    request_ids: list[str]
    prompt_sha256: list[str]
    context_sha256: list[str]
    metadata: dict[str, str] = field(default_factory=dict)

    def by_request(self) -> dict[tuple[str, int], np.ndarray]:
        """Rows float32 [vocab] by request id and output index, as `certify` takes them."""
        keys = zip(self.request_ids, self.output_indices.tolist(), strict=True)
        return dict(zip(keys, self.rows, strict=True))


def write_captures(path: Path, rows: Iterable[CapturedRow], metadata: Mapping[str, str] | None = None) -> None:
    """Write the rows in the order given, atomically. All rows must be float32 of one vocabulary. Raises OSError."""
    listed = list(rows)
    arrays = {
        "rows": np.stack([row.logits for row in listed]) if listed else np.zeros((0, 0), np.float32),
        "output_indices": np.array([row.index for row in listed], np.int64),
        "positions": np.array([row.position for row in listed], np.int64),
        "token_ids": np.array([row.token_ids[row.index] for row in listed], np.int64),
    }
    assert arrays["rows"].dtype == np.float32
    strings = {
        "request_ids": [row.request_id for row in listed],
        "prompt_sha256": [row.prompt_sha256 for row in listed],
        "context_sha256": [row.context_sha256 for row in listed],
    }
    header = {**(metadata or {}), **{name: json.dumps(items) for name, items in strings.items()}, "format": _FORMAT}
    with safetensors_as_os_errors(path):
        write_atomically(path, lambda temporary: save_file(arrays, temporary, header))


def read_captures(path: Path) -> Captures:
    """Read a captures file. Raises LogitsFileError when it is missing, cut short, or something else."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            if metadata.pop("format", None) != _FORMAT:
                raise LogitsFileError(f"{path}: not a captures file of this version; name a run folder or {CAPTURES}")
            arrays = {name: np.asarray(file.get_tensor(name)) for name in _ARRAYS}
        strings: dict[str, list[str]] = {name: json.loads(metadata.pop(name)) for name in _STRINGS}
    except OSError as error:
        raise LogitsFileError(f"{path}: cannot be opened ({error.strerror or error}); check the path") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise LogitsFileError(f"{path}: cut short or damaged ({error}); make the run again") from error
    lengths = {len(array) for array in arrays.values()} | {len(items) for items in strings.values()}
    if len(lengths) != 1:
        raise LogitsFileError(f"{path}: its lists differ in length; make the run again")
    return Captures(
        rows=arrays["rows"],
        output_indices=arrays["output_indices"],
        positions=arrays["positions"],
        token_ids=arrays["token_ids"],
        request_ids=strings["request_ids"],
        prompt_sha256=strings["prompt_sha256"],
        context_sha256=strings["context_sha256"],
        metadata=metadata,
    )
