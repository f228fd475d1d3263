"""MindSpore's file format: what a writer wrote comes back, and every damage is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.checkpoints.mindspore_writer import bytes_field, value_message, varint, write_mindspore_ckpt

from isologit.checkpoints.mindspore_ckpt import read_mindspore_ckpt
from isologit.errors import ModelError

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).view(5, 7),
    "a": torch.linspace(-3, 3, 300).half(),  # odd name lengths put contents at odd offsets
    "bb": torch.linspace(-3, 3, 6).bfloat16().view(1, 2, 3),
    "scalar": torch.tensor(2.5),
}


def check_same(file: Path) -> None:
    stored = read_mindspore_ckpt(file)
    assert list(stored) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert stored[name].shape == tuple(tensor.shape)
        loaded = stored[name].load()
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("part_bytes", [1, 7, 16, 1 << 29])
@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize(("packed_dims", "scalar_dims"), [(False, ()), (True, (0,))])
def test_round_trip(
    tmp_path: Path, part_bytes: int, crc: bool, packed_dims: bool, scalar_dims: tuple[int, ...]
) -> None:
    file = tmp_path / "x.ckpt"
    write_mindspore_ckpt(
        file, TENSORS, part_bytes=part_bytes, crc=crc, packed_dims=packed_dims, scalar_dims=scalar_dims
    )
    check_same(file)


def test_a_file_by_mindspore_itself() -> None:
    """Written by MindSpore 2.7.0 with `crc_check=True` and its limit of 512 MiB a part lowered to 1 KiB."""
    stored = read_mindspore_ckpt(Path(__file__).parent / "data" / "by_mindspore_2_7.ckpt")
    assert torch.equal(
        stored["model.tok_embeddings.embedding_weight"].load(), torch.arange(300, dtype=torch.float32).view(100, 3)
    )
    assert torch.equal(
        stored["model.layers.0.attention.wq.weight"].load(), torch.arange(16, dtype=torch.float16).view(4, 4)
    )
    assert torch.equal(stored["model.norm_out.weight"].load(), torch.arange(-2, 3, dtype=torch.bfloat16))
    assert torch.equal(stored["scale"].load(), torch.tensor(2.5))
    assert (stored["step_num"].dtype, stored["step_num"].shape) == ("Int32", ())


def test_nothing_is_copied_when_aligned(tmp_path: Path) -> None:
    for name in ("n", "nn", "nnn", "nnnn"):
        write_mindspore_ckpt(tmp_path / "x.ckpt", {name: torch.arange(6.0)})
        stored = read_mindspore_ckpt(tmp_path / "x.ckpt")[name]
        first, second = stored.load(), stored.load()
        offset = (tmp_path / "x.ckpt").read_bytes().index(torch.arange(6.0).numpy().tobytes())
        assert (first.data_ptr() == second.data_ptr()) == (offset % 4 == 0)
        assert first.data_ptr() % 4 == 0


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    """A terabyte that is all hole on the disk: opening maps it, and a tensor costs nothing until it is read."""
    content = 1 << 40
    tensor = varint(1 << 3) + varint(content // 4) + bytes_field(2, b"Float32") + varint(3 << 3 | 2) + varint(content)
    value = bytes_field(1, b"huge") + varint(2 << 3 | 2) + varint(len(tensor) + content) + tensor
    with (tmp_path / "x.ckpt").open("wb") as file:
        file.write(varint(1 << 3 | 2) + varint(len(value) + content) + value)
        try:
            file.truncate(file.tell() + content)
        except OSError:
            pytest.skip("the disk does not take files with holes")
    assert read_mindspore_ckpt(tmp_path / "x.ckpt")["huge"].shape == (content // 4,)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    write_mindspore_ckpt(tmp_path / "x.ckpt", {"nnnn": torch.arange(6.0)})
    before = (tmp_path / "x.ckpt").read_bytes()
    read_mindspore_ckpt(tmp_path / "x.ckpt")["nnnn"].load().zero_()
    assert (tmp_path / "x.ckpt").read_bytes() == before


def test_other_types_are_named_but_not_loaded(tmp_path: Path) -> None:
    write_mindspore_ckpt(tmp_path / "x.ckpt", {"steps": torch.arange(3, dtype=torch.int32)})
    stored = read_mindspore_ckpt(tmp_path / "x.ckpt")["steps"]
    assert (stored.dtype, stored.shape) == ("Int32", (3,))
    with pytest.raises(ModelError, match="steps is not a tensor of weights"):
        stored.load()


@pytest.mark.parametrize("crc", [False, True])
def test_every_truncation_is_noticed(tmp_path: Path, crc: bool) -> None:
    """At any byte the file is refused, but where it ends between tensors: then the names that are left tell."""
    file = tmp_path / "x.ckpt"
    tensors = {"matrix": TENSORS["matrix"], "bb": TENSORS["bb"], "scalar": TENSORS["scalar"]}
    write_mindspore_ckpt(file, tensors, part_bytes=64, crc=crc)
    content = file.read_bytes()
    complete = 0
    for keep in range(len(content)):
        file.write_bytes(content[:keep])
        with contextlib.suppress(ModelError):
            complete += len(read_mindspore_ckpt(file)) < len(tensors)
    assert complete == len(tensors) - 1


def test_truncation_says_so(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    write_mindspore_ckpt(file, TENSORS)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"x\.ckpt: is truncated: its last tensor is cut off; copy it again"):
        read_mindspore_ckpt(file)
    write_mindspore_ckpt(file, {"matrix": TENSORS["matrix"]}, part_bytes=140)
    file.write_bytes(value_message("matrix", (5, 7), "Float32", bytes(100)))
    with pytest.raises(ModelError, match=r"matrix has 100 bytes, but its shape \[5, 7\] in float32 needs 140"):
        read_mindspore_ckpt(file)


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_checksum_notices_every_changed_bit(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    file = tmp_path_factory.mktemp("crc") / "x.ckpt"
    write_mindspore_ckpt(file, TENSORS, crc=True)
    content = bytearray(file.read_bytes())
    content[position % (len(content) - 17)] ^= 1 << bit
    file.write_bytes(content)
    with pytest.raises(ModelError, match="its checksum is wrong, so the file is damaged"):
        read_mindspore_ckpt(file)


@given(st.binary(min_size=1, max_size=200))
@settings(max_examples=200, deadline=None)
def test_garbage_never_escapes_as_another_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("garbage") / "x.ckpt"
    file.write_bytes(content)
    with pytest.raises(ModelError):
        read_mindspore_ckpt(file)


TENSOR = varint(1 << 3) + varint(1) + bytes_field(2, b"Float32") + bytes_field(3, bytes(4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xd8\x5e\x3a\x7f" + bytes(60), "is encrypted; decrypt it with MindSpore"),
        (b"\xd9\x5e\x3a\x7f" + bytes(60), "is encrypted"),
        (b"PK\x03\x04" + bytes(60), "is a PyTorch file, not a MindSpore checkpoint"),
        (b"GARBAGE! " * 20, "is not a MindSpore checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a MindSpore checkpoint"),
        (bytes_field(2, b"x"), "is not a MindSpore checkpoint"),
        (bytes_field(1, bytes_field(1, b"name")), "is not a MindSpore checkpoint"),
        (bytes_field(1, bytes_field(1, b"name") + bytes_field(3, TENSOR)), "is not a MindSpore checkpoint"),
        (bytes_field(1, bytes_field(1, b"\xff") + bytes_field(2, TENSOR)), "is not a MindSpore checkpoint"),
        (bytes_field(1, bytes_field(1, b"name") + varint(2 << 3 | 2) + varint(99)), "is not a MindSpore checkpoint"),
        (bytes_field(1, bytes_field(1, b"n") + bytes_field(2, bytes_field(4, b""))), "is not a MindSpore checkpoint"),
        (
            value_message("a", (2,), "Float32", bytes(4)) + value_message("a", (3,), "Float32", bytes(4)),
            "is not a MindSpore checkpoint",
        ),
        (
            value_message("a", (1,), "Float32", bytes(4))
            + value_message("b", (1,), "Float32", bytes(4))
            + value_message("a", (1,), "Float32", bytes(4)),
            "is not a MindSpore checkpoint",
        ),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.ckpt"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=rf"x\.ckpt: {message}"):
        read_mindspore_ckpt(file)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_mindspore_ckpt(tmp_path)
