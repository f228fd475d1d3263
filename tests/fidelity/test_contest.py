"""Contest files: the documented names, positions, contents, and an index that survives colliding keys."""

from __future__ import annotations

import json
import os
import sys
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from isologit.errors import OutputFolderError
from isologit.fidelity import CapturedRow, LogitsFileError, contest_positions, write_contest_logits
from isologit.fidelity.contest import LogitsName, read_contest_row, read_sidecar, sentence_key

DESCRIBE_THE = [1, 20355, 915, 278, 17]


def _row(prompt: list[int], outputs: list[int], index: int, request_id: str = "r") -> CapturedRow:
    return CapturedRow(request_id, prompt, outputs, index, np.arange(6, dtype=np.float32) + index)


def test_keys_are_those_of_the_documented_example() -> None:
    assert sentence_key(DESCRIBE_THE, prefill=False) == "1.020355.0915.0278.0"
    assert sentence_key(DESCRIBE_THE, prefill=True).startswith("12035591527")


def test_short_prefills_show_their_padding() -> None:
    assert sentence_key([1], prefill=True) == "1" + "0" * 19


def test_the_documented_name_is_read_back() -> None:
    text = "1718418290.5565388_1.020355.0915.0278.0_100.npy"
    name = LogitsName.parse(text)
    assert (name.time, name.key, name.position) == (1718418290.5565388, "1.020355.0915.0278.0", 100)
    assert str(name) == text


@pytest.mark.parametrize("name", ["x.npy", "1_2.npy", "1.5_1.0_100.npz", "1.5_1.0_-1.npy"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(LogitsFileError, match="TIME_KEY_POSITION"):
        LogitsName.parse(name)


def test_positions_are_those_where_the_last_fed_token_is_at_a_multiple_of_100() -> None:
    for prompt_len in (*range(1, 120), 193, 201, 512):
        for outputs in (1, 2, 99, 100, 101, 320):
            expected = [i for i in range(outputs) if (prompt_len - 1 + i) % 100 == 0]
            assert contest_positions(prompt_len, outputs) == expected
    assert contest_positions(101, 5) == [0]  # the prefill itself
    assert contest_positions(21, 52) == []  # most requests of the contest leave no file
    assert contest_positions(21, 200) == [80, 180]


def test_files_hold_float32_rows_in_the_order_of_their_times(tmp_path: Path) -> None:
    rows = [_row([*DESCRIBE_THE] * 4 + [9], list(range(3, 90)), 80, str(i)) for i in range(30)]
    rows.append(_row(list(range(1, 102)), [7], 0, "prefill"))
    files = write_contest_logits(tmp_path, rows)
    names = [LogitsName.parse(file.name) for file in files]
    assert all(a.time < b.time for a, b in pairwise(names))
    assert [name.position for name in names] == [100] * 31
    assert names[0].key == "1.020355.0915.0278.0"
    assert names[-1].key == "12345678910111213141"
    saved = np.load(files[0])
    assert saved.shape == (1, 6)
    assert saved.dtype == np.float32
    np.testing.assert_array_equal(read_contest_row(files[0]), rows[0].logits)
    index = read_sidecar(tmp_path)
    assert [index[file.name]["request_id"] for file in files] == [row.request_id for row in rows]
    assert index[files[0].name]["prompt_sha256"] == rows[0].prompt_sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f.name for f in files), "index.jsonl"])


def test_a_folder_of_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    write_contest_logits(tmp_path, [_row([1], [5], 0)])
    with pytest.raises(OutputFolderError, match="already holds"):
        write_contest_logits(tmp_path, [_row([1], [5], 0)])


def test_a_row_at_another_position_is_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="position 1 "):
        write_contest_logits(tmp_path, [_row([1], [5, 6], 1)])


def test_both_shapes_of_the_contest_are_one_row(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 1, 7), np.float32))
    assert read_contest_row(tmp_path / "a.npy").shape == (7,)
    np.save(tmp_path / "b.npy", np.zeros((2, 7), np.float32))
    with pytest.raises(LogitsFileError, match="one row"):
        read_contest_row(tmp_path / "b.npy")


def test_a_cut_or_missing_file_says_so(tmp_path: Path) -> None:
    path = write_contest_logits(tmp_path, [_row([1], [5], 0)])[0]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(LogitsFileError, match="save it again"):
        read_contest_row(path)
    path.write_bytes(b"text")
    with pytest.raises(LogitsFileError, match="save it again"):
        read_contest_row(path)


def test_a_broken_index_names_its_line(tmp_path: Path) -> None:
    write_contest_logits(tmp_path, [_row([1], [5], 0)])
    index = tmp_path / "index.jsonl"
    index.write_text(index.read_text() + json.dumps({"file": "x.npy"}) + "\n")
    with pytest.raises(LogitsFileError, match="line 2"):
        read_sidecar(tmp_path)


class Tensor:
    """Stands for MindSpore's: pickled by class and value."""

    def __init__(self, value: float) -> None:
        self.value = value

    def asnumpy(self) -> np.ndarray:
        return np.array(self.value, np.float32)


def _save_tensors(path: Path, values: list[object]) -> None:
    array = np.empty((1, 1, len(values)), object)
    array[0, 0, :] = values
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=True)


def test_mindspore_tensors_need_mindspore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "__module__", "mindspore.common.tensor")
    package = types.ModuleType("mindspore")
    module = types.ModuleType("mindspore.common.tensor")
    module.Tensor = Tensor  # type: ignore[attr-defined]
    for name, part in {"mindspore": package, "mindspore.common": package, "mindspore.common.tensor": module}.items():
        monkeypatch.setitem(sys.modules, name, part)
    _save_tensors(tmp_path / "a.npy", [Tensor(1.5), Tensor(-2.0)])
    np.testing.assert_array_equal(read_contest_row(tmp_path / "a.npy"), np.array([1.5, -2.0], np.float32))

    monkeypatch.setitem(sys.modules, "mindspore", None)
    with pytest.raises(LogitsFileError, match="MindSpore cannot be imported"):
        read_contest_row(tmp_path / "a.npy")


def test_a_logits_file_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "made"),)

    monkeypatch.setitem(sys.modules, "mindspore", types.ModuleType("mindspore"))
    _save_tensors(tmp_path / "a.npy", [Hostile()])
    with pytest.raises(LogitsFileError, match="no MindSpore tensor"):
        read_contest_row(tmp_path / "a.npy")
    assert not (tmp_path / "made").exists()
