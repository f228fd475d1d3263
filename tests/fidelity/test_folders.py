"""Comparing two sets of saved logits: pairs by prompt or by name, and every kind of difference is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isologit.fidelity import (
    CAPTURES,
    CapturedRow,
    LogitsFileError,
    compare_folders,
    read_captures,
    write_captures,
    write_contest_logits,
)

VOCAB = 12
Change = Callable[[np.ndarray], np.ndarray]


def _rows(n: int = 4) -> list[CapturedRow]:
    """Rows of prompts that share the contest's key: they differ only after its first 20 characters."""
    rng = np.random.default_rng(0)
    prompts = [[1, 20355, 915, 278, 300 + i, *range(400, 495)] for i in range(n)]
    return [
        CapturedRow(f"r{i}", prompt, [7, 8], 1, rng.normal(0, 3, VOCAB).astype(np.float32))
        for i, prompt in enumerate(prompts)
    ]


def _changed(rows: list[CapturedRow], at: int, change: Change) -> list[CapturedRow]:
    changed = list(rows)
    changed[at] = replace(rows[at], logits=change(rows[at].logits.copy()))
    return changed


def _set(token: int, value: float) -> Change:
    def change(logits: np.ndarray) -> np.ndarray:
        logits[token] = value
        return logits

    return change


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "a", tmp_path / "b"


def test_same_rows_in_another_order_pass_when_paired_by_prompt(folders: tuple[Path, Path]) -> None:
    a, b = folders
    write_contest_logits(a, _rows())
    write_contest_logits(b, reversed(_rows()))
    found = compare_folders(a, b)
    assert found.verdict.valid
    assert found.pairing == "prompt"
    assert found.comparison.max_abs == 0
    assert found.summary_lines()[0].startswith("PASS: 4 rows")


def test_without_an_index_colliding_keys_are_paired_by_time(folders: tuple[Path, Path]) -> None:
    a, b = folders
    write_contest_logits(a, _rows())
    write_contest_logits(b, _rows())
    (a / "index.jsonl").unlink()
    found = compare_folders(a, b)
    assert found.verdict.valid
    assert found.pairing == "name"

    for file in b.iterdir():
        file.unlink()
    write_contest_logits(b, reversed(_rows()))
    assert not compare_folders(a, b).verdict.valid  # the contest's own weakness: another order, other pairs


def test_the_worst_row_and_token_are_named(folders: tuple[Path, Path]) -> None:
    a, b = folders
    files = write_contest_logits(a, _rows())
    write_contest_logits(b, _changed(_rows(), 2, _set(5, 99.0)))
    found = compare_folders(a, b)
    assert not found.verdict.valid
    assert found.failed == (files[2].name,)
    assert found.comparison.worst is not None
    assert (found.comparison.worst.key, found.comparison.worst.token) == (files[2].name, 5)
    assert any(files[2].name in line and "token 5" in line for line in found.summary_lines())
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        (_set(3, float("nan")), "nonfinite"),
        (_set(3, float("inf")), "nonfinite"),
        (lambda logits: logits[:-1], "shape_mismatches"),
    ],
)
def test_every_kind_of_broken_row_fails(folders: tuple[Path, Path], change: Change, figure: str) -> None:
    a, b = folders
    write_contest_logits(a, _rows())
    write_contest_logits(b, _changed(_rows(), 1, change))
    found = compare_folders(a, b)
    assert not found.verdict.valid
    assert getattr(found.comparison, figure) == 1
    json.dumps(found.to_dict(), allow_nan=False)


def test_another_dtype_fails(folders: tuple[Path, Path]) -> None:
    a, b = folders
    write_contest_logits(a, _rows(1))
    file = write_contest_logits(b, _rows(1))[0]
    np.save(file, np.load(file).astype(np.float64))
    assert compare_folders(a, b).comparison.dtype_mismatches == 1


def test_missing_and_extra_rows_fail_and_are_named(folders: tuple[Path, Path]) -> None:
    a, b = folders
    kept = write_contest_logits(a, _rows(4))
    write_contest_logits(b, _rows(3))
    found = compare_folders(a, b)
    assert found.only_in_a == (kept[3].name,)
    assert not found.verdict.valid
    assert compare_folders(b, a).only_in_b == (kept[3].name,)
    assert any(kept[3].name in line for line in found.summary_lines())


def test_the_tolerance_is_numpys_with_b_as_the_base(folders: tuple[Path, Path]) -> None:
    a, b = folders
    write_contest_logits(a, _changed(_rows(1), 0, _set(0, 1.0)))
    write_contest_logits(b, _changed(_rows(1), 0, _set(0, 1.004)))
    assert compare_folders(a, b).verdict.valid
    assert not compare_folders(a, b, atol=3e-3).verdict.valid
    assert compare_folders(a, b, atol=0.0, rtol=0.004).verdict.valid
    assert not compare_folders(b, a, atol=0.0, rtol=0.0039).verdict.valid


def test_captures_files_pair_with_each_other_and_with_contest_folders(folders: tuple[Path, Path]) -> None:
    a, b = folders
    a.mkdir()
    write_captures(a / CAPTURES, _rows(), {"run": "first"})
    write_contest_logits(b, reversed(_rows()))
    assert compare_folders(a, b).verdict.valid
    assert compare_folders(a / CAPTURES, a).verdict.valid
    read = read_captures(a / CAPTURES)
    assert read.metadata == {"run": "first"}
    assert list(read.by_request()) == [(f"r{i}", 1) for i in range(4)]
    assert read.token_ids.tolist() == [8] * 4
    np.testing.assert_array_equal(read.by_request()["r2", 1], _rows()[2].logits)


def test_rows_after_other_tokens_are_pointed_out(folders: tuple[Path, Path]) -> None:
    a, b = (folder.with_suffix(".safetensors") for folder in folders)
    row = _rows(1)[0]
    write_captures(a, [CapturedRow("r", row.prompt_token_ids, [7, 8], 1, row.logits)])
    write_captures(b, [CapturedRow("r", row.prompt_token_ids, [6, 8], 1, row.logits + 1)])
    found = compare_folders(a, b)
    assert found.contexts_differ == ("request r output token 1",)
    assert any("tokens before the row differ" in line for line in found.summary_lines())


def test_a_contest_folder_without_index_cannot_meet_a_captures_file(folders: tuple[Path, Path]) -> None:
    a, b = folders
    write_contest_logits(a, _rows())
    (a / "index.jsonl").unlink()
    b.mkdir()
    write_captures(b / CAPTURES, _rows())
    with pytest.raises(LogitsFileError, match="cannot be paired"):
        compare_folders(a, b)


def test_what_cannot_be_read_is_an_error_with_advice(folders: tuple[Path, Path]) -> None:
    a, b = folders
    with pytest.raises(LogitsFileError, match="no such file"):
        compare_folders(a, b)
    a.mkdir()
    with pytest.raises(LogitsFileError, match="nothing can be compared"):
        compare_folders(a, b)
    path = a / CAPTURES
    write_captures(path, [])
    with pytest.raises(LogitsFileError, match="holds no rows"):
        compare_folders(a, b)
    write_captures(path, _rows())
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(LogitsFileError, match="cut short"):
            compare_folders(a, b)
    path.unlink()
    with pytest.raises(LogitsFileError, match="cannot be opened"):
        read_captures(path)
