"""Prompt files: every record is accounted for once, and whatever is wrong is said with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isologit.errors import DatasetError
from isologit.workload import BadRequest, RequestSpec, load_dataset, load_replay

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


class Words:
    """A tokenizer of one id per word."""

    def encode(self, text: str) -> list[int]:
        return [1, *self.encode_without_bos(text)]

    def encode_without_bos(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(i) for i in token_ids)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "prompts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_alpaca_prompt_rule_and_lengths(tmp_path: Path) -> None:
    records = [
        {"instruction": "Add", "input": "two", "output": "four"},
        {"instruction": "Say", "input": "", "output": "x"},
        {"instruction": "Nothing", "input": "", "output": ""},
        "text",
    ]
    first, second, empty, wrong = load_dataset(write(tmp_path, json.dumps(records)), Words())
    assert isinstance(first, RequestSpec)
    assert (first.prompt, first.max_new_tokens) == ("Add:two", 4)
    assert isinstance(second, RequestSpec)
    assert (second.prompt, second.max_new_tokens) == ("Say", 1)
    assert isinstance(empty, BadRequest)
    assert isinstance(wrong, BadRequest)
    assert "record 3" in wrong.where


def test_jsonl_and_lines(tmp_path: Path) -> None:
    text = (
        '{"prompt": "a", "max_new_tokens": 3}\n\n{"prompt_token_ids": [1, 2], "id": "x"}\n{"prompt": ""}\n{"prompt": 1'
    )
    one, two, empty, torn = load_dataset(write(tmp_path, text), None, default_max_new_tokens=7)
    assert (one.id, two.id) == ("0", "x")
    assert isinstance(two, RequestSpec)
    assert (two.prompt_token_ids, two.max_new_tokens) == ([1, 2], 7)
    assert isinstance(empty, BadRequest)
    assert "empty" in empty.error
    assert isinstance(torn, BadRequest)
    assert torn.where.endswith(":5")
    lines = load_dataset(write(tmp_path, "one\n\ntwo\n"), None, limit=1)
    assert [r.where.rsplit(":", 1)[1] for r in lines] == ["1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"ok\n\xff\xfe", "prompts:2: not UTF-8"),
        (b"[1, ", "malformed JSON"),
        (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', "appears twice"),
        (b'{"prompt": "a", "max_new_tokens": 0}', "none of its 1 records"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as error:
        load_dataset(write(tmp_path, content), Words())
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        load_dataset(tmp_path / "none", None)
    with pytest.raises(DatasetError, match="folder"):
        load_dataset(tmp_path, None)


values = st.recursive(st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=4), st.lists, max_leaves=4)
objects = st.dictionaries(st.sampled_from(["id", "prompt", "prompt_token_ids", "max_new_tokens", "other"]), values)


@settings(max_examples=150, deadline=None)
@given(records=st.lists(objects, min_size=1, max_size=6))
def test_every_record_is_accounted_for_once(tmp_path_factory: pytest.TempPathFactory, records: list[object]) -> None:
    path = write(tmp_path_factory.mktemp("p"), "\n".join(json.dumps(record) for record in records))
    try:
        loaded = load_dataset(path, Words())
    except DatasetError:
        return
    assert len(loaded) == len(records)
    assert len({record.id for record in loaded}) == len(records)


def test_replay_reads_tokens_and_text(tmp_path: Path) -> None:
    text = (
        '{"id": 0, "token_ids": [5, 6]}\n{"id": "b", "my_text": " hi"}\n{"id": 2, "error": "x"}\n{"id": 3, "text": ""}'
    )
    assert load_replay(write(tmp_path, text), Words()) == {"0": [5, 6], "b": [32, 104, 105], "3": []}
    for bad in (
        '{"id": 1}',
        '{"text": "a"}',
        '{"id": 1, "token_ids": ["a"]}',
        "{",
        '{"id":1,"text":"a"}\n{"id":1,"text":"b"}',
    ):
        with pytest.raises(DatasetError, match="prompts:"):
            load_replay(write(tmp_path, bad), Words())


@pytest.mark.skipif(not SHARED.exists(), reason="needs the development data")
def test_recorded_answers_survive_encoding() -> None:
    from isologit.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(SHARED / "llama_tokenizer")
    assert tokenizer is not None
    replay = load_replay(SHARED / "alpaca_contest_first1000_answers.jsonl", tokenizer)
    assert len(replay) == 1000
    records = load_dataset(SHARED / "alpaca_contest_first1000.json", tokenizer)
    assert sum(r.max_new_tokens for r in records if isinstance(r, RequestSpec)) > 60_000
