"""MindSpore's `.ckpt` files, read without MindSpore. Knows the file format; names are judged elsewhere.

The file is a run of protobuf messages, in wire terms one long `repeated Value value = 1`:

    Value       { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

Contents are little-endian and row-major. A large tensor is several values in a row with one tag, each with the full
dims and a part of the bytes. The file may end in `crc_num` and the CRC-32 of all before it, ten bytes big-endian.
"""

from __future__ import annotations

import math
import mmap
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isologit.checkpoints.raw_file import RawFile
from isologit.checkpoints.stored import WEIGHT_DTYPES, StoredTensor
from isologit.errors import ModelError

_DTYPES = {"Float16": "float16", "BFloat16": "bfloat16", "Float32": "float32"}
_ENCRYPTED_MAGICS = {0x7F3A5ED8, 0x7F3A5ED9, 0x7F3A5EDA}  # AES-GCM, AES-CBC, SM4-CBC; the first four bytes
_ZIP_MAGIC = b"PK\x03\x04"
_CRC_MARK = b"crc_num"
_CRC_BYTES = 10
_VARINT, _LENGTH_DELIMITED = 0, 2
_CRC_CHUNK_BYTES = 1 << 24
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python's mmap has no name for it


class _EndOfBytes(Exception):
    """A field reaches beyond the bytes it should lie in."""


class _Malformed(Exception):
    """The bytes are no such message."""


@dataclass
class _Parts:
    """A tensor as found in the file: `ranges` are (start, end) of its parts in the file."""

    dims: tuple[int, ...]
    type_name: str
    ranges: list[tuple[int, int]] = field(default_factory=list)


def read_mindspore_ckpt(file: Path) -> dict[str, StoredTensor]:
    """Names, shapes and types of all parameters; the values stay in the file, memory-mapped.

    Verifies the checksum when the file has one (reads all of it). Raises ModelError for a file that is encrypted,
    damaged, truncated or not of this format.
    """
    try:
        raw = RawFile(file)
        with file.open("rb") as handle:
            # Copy-on-write: tensors over the mapping are writable and the file never changes. No memory is reserved for
            # it, so the file may be larger than memory.
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            data = mmap.mmap(handle.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except ValueError:
        raise ModelError(f"{file}: is empty; copy it again") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from None
    _refuse_other_formats(data, file)
    end = _end_of_messages(data, raw)
    try:
        tensors = _parse(data, end)
    except _EndOfBytes:
        raise ModelError(f"{file}: is truncated: its last tensor is cut off; copy it again") from None
    except (_Malformed, UnicodeDecodeError):
        raise ModelError(f"{file}: is not a MindSpore checkpoint, or is damaged; copy it again") from None
    return {name: _stored(name, parts, data, raw) for name, parts in tensors.items()}


def _refuse_other_formats(data: mmap.mmap, file: Path) -> None:
    if int.from_bytes(data[:4], "little") in _ENCRYPTED_MAGICS:
        raise ModelError(f"{file}: is encrypted; decrypt it with MindSpore and save it again without a key")
    if data[:4] == _ZIP_MAGIC:
        raise ModelError(f"{file}: is a PyTorch file, not a MindSpore checkpoint; convert it to safetensors")


def _end_of_messages(data: mmap.mmap, raw: RawFile) -> int:
    """Where the messages end: before the checksum, which is verified, or at the end of the file."""
    end = len(data) - _CRC_BYTES - len(_CRC_MARK)
    if end < 0 or data[end : end + len(_CRC_MARK)] != _CRC_MARK:
        return len(data)
    expected, actual = int.from_bytes(data[-_CRC_BYTES:], "big"), 0
    chunk = memoryview(bytearray(min(_CRC_CHUNK_BYTES, end)))
    for start in range(0, end, _CRC_CHUNK_BYTES):  # read, not mapped: pages of a mapping count as this process's memory
        part = chunk[: end - start]
        raw.read_into(start, part)
        actual = zlib.crc32(part, actual)
    if actual != expected:
        raise ModelError(f"{raw.path}: its checksum is wrong, so the file is damaged; copy it again")
    return end


def _parse(data: mmap.mmap, end: int) -> dict[str, _Parts]:
    tensors: dict[str, _Parts] = {}
    last = None
    for number, value in _fields(data, 0, end):
        if number != 1 or isinstance(value, int):
            raise _Malformed
        try:
            name, dims, type_name, content = _parse_value(data, *value)
        except _EndOfBytes:
            raise _Malformed from None
        if name != last:
            if name in tensors:
                raise _Malformed
            tensors[name] = _Parts(dims, type_name)
        elif (dims, type_name) != (tensors[name].dims, tensors[name].type_name):
            raise _Malformed
        tensors[name].ranges.append(content)
        last = name
    return tensors


def _parse_value(data: mmap.mmap, start: int, end: int) -> tuple[str, tuple[int, ...], str, tuple[int, int]]:
    """Tag, dims, type and the range of the content of one `Value`."""
    name, tensor = None, None
    for number, value in _fields(data, start, end):
        if number == 1 and isinstance(value, tuple):
            name = data[slice(*value)].decode()
        elif number == 2 and isinstance(value, tuple):
            tensor = value
        else:
            raise _Malformed
    if name is None or tensor is None:
        raise _Malformed
    dims: list[int] = []
    type_name, content = "", (0, 0)
    for number, value in _fields(data, *tensor):
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 1 and isinstance(value, tuple):  # packed
            position = value[0]
            while position < value[1]:
                dim, position = _varint(data, position, value[1])
                dims.append(dim)
        elif number == 2 and isinstance(value, tuple):
            type_name = data[slice(*value)].decode()
        elif number == 3 and isinstance(value, tuple):
            content = value
        else:
            raise _Malformed
    return name, tuple(dims), type_name, content


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Field numbers and values of a message: an integer, or the (start, end) of a length-delimited field."""
    while start < end:
        key, start = _varint(data, start, end)
        value, start = _varint(data, start, end)  # of a length-delimited field this is the length
        if key & 7 == _VARINT:
            yield key >> 3, value
        elif key & 7 == _LENGTH_DELIMITED:
            if start + value > end:
                raise _EndOfBytes
            yield key >> 3, (start, start + value)
            start += value
        else:
            raise _Malformed


def _varint(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """The number at `start` and where it ends: seven bits a byte, the lowest first, the high bit set on all but one."""
    value = 0
    for position in range(start, min(end, start + 10)):
        value |= (data[position] & 0x7F) << 7 * (position - start)
        if data[position] < 0x80:
            return value, position + 1
    raise _EndOfBytes if start + 10 > end else _Malformed


def _stored(name: str, parts: _Parts, data: mmap.mmap, raw: RawFile) -> StoredTensor:
    file, dtype = raw.path, _DTYPES.get(parts.type_name)
    if dtype is None:
        refuse = partial(_refuse, name, file)
        return StoredTensor(parts.dims, parts.type_name or "no type", file, refuse, refuse)
    num_bytes = sum(end - start for start, end in parts.ranges)
    item_bytes = WEIGHT_DTYPES[dtype].itemsize
    scalar = parts.dims == (0,) and num_bytes == item_bytes  # some versions write a scalar's dims so
    shape = () if scalar else parts.dims
    if num_bytes != math.prod(shape) * item_bytes:
        raise ModelError(
            f"{file}: {name} has {num_bytes} bytes, but its shape {list(shape)} in {dtype} needs "
            f"{math.prod(shape) * item_bytes}; the file is truncated or damaged, copy it again"
        )
    mapped = None
    if len(parts.ranges) == 1 and parts.ranges[0][0] % item_bytes == 0:
        mapped = partial(_map, data, parts.ranges[0][0], shape, WEIGHT_DTYPES[dtype])
    return StoredTensor(shape, dtype, file, partial(_read, raw, parts.ranges), mapped)


def _map(data: mmap.mmap, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


def _read(raw: RawFile, ranges: list[tuple[int, int]], first_row: int, out: np.ndarray) -> None:
    """Rows of a tensor whose bytes lie in `ranges` of the file, one after another."""
    left, skip = out.reshape(-1), first_row * out.shape[1]
    for start, end in ranges:
        taken = max(0, min(end - start - skip, len(left)))
        raw.read_into(start + skip, left[:taken])
        left, skip = left[taken:], max(0, skip - (end - start))


def _refuse(name: str, file: Path, *_: object) -> Any:
    raise ModelError(f"{file}: {name} is not a tensor of weights")
