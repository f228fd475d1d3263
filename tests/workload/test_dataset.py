"""Prompt files: every record is accounted for once, and whatever is wrong is said with its place."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Literal

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


LONG = '"x": ' + "1" * 5000
DEEP = '"x": ' + "[" * 100_000 + "]" * 100_000
ODD_FIELDS = {  # of an Alpaca record or a JSONL record that is otherwise sound
    "nested": (DEEP, "the JSON is nested too deeply"),
    "twice": ('"output": "a", "output": "b", "prompt": "a", "prompt": "b"', "appears twice; keep one"),
}


@pytest.mark.parametrize("odd", ODD_FIELDS)
def test_an_odd_record_does_not_stop_the_others(tmp_path: Path, odd: str) -> None:
    fields, message = ODD_FIELDS[odd]
    good = '{"instruction": "a", "output": "b", "prompt": "a"}'
    bad = good[:-1] + f", {fields}}}"
    for text in (f"[{good}, {bad}, {good}]", f"{good}\n{bad}\n{good}"):
        first, wrong, last = load_dataset(write(tmp_path, text), Words())
        assert isinstance(first, RequestSpec)
        assert isinstance(last, RequestSpec)
        assert isinstance(wrong, BadRequest)
        assert message in wrong.error
        assert wrong.where.endswith(("record 1", ":2"))


def test_numbers_that_no_field_reads_do_no_harm(tmp_path: Path) -> None:
    for extra in (LONG, '"x": NaN', '"x": -Infinity'):
        text = f'{{"prompt": "a", {extra}}}'
        assert isinstance(load_dataset(write(tmp_path, text), Words())[0], RequestSpec)
        text = f'[{{"instruction": "a", "output": "b", {extra}}}]'
        assert isinstance(load_dataset(write(tmp_path, text), Words())[0], RequestSpec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"instruction": "a", "output": "\\ud800"', "output is not valid Unicode"),
        ('"instruction": "\\udfff", "output": "b"', "instruction is not valid Unicode"),
        ('"instruction": "a", "input": NaN, "output": "b"', "input must be text, not NaN"),
        ('"instruction": "a", "output": 5', "output must be text, not 5"),
        ('"instruction": "a"', "output must be text, not null"),
        ('"instruction": ["a"], "output": "b"', "instruction must be text, not a list"),
    ],
)
def test_odd_fields_of_alpaca_records(tmp_path: Path, fields: str, message: str) -> None:
    text = f'[{{{fields}}}, {{"instruction": "a", "input": null, "output": "b"}}]'
    wrong, good = load_dataset(write(tmp_path, text), Words())
    assert isinstance(good, RequestSpec)
    assert isinstance(wrong, BadRequest)
    assert message in wrong.error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"prompt": "\\ud800"', "prompt is not valid Unicode"),
        ('"prompt": "a", "id": "\\ud800"', "id is not valid Unicode"),
        ('"prompt": "a", "id": 1.5', "id must be text or an integer, not 1.5"),
        ('"prompt": "a", "id": true', "id must be text or an integer, not true"),
        ('"prompt": "a", "id": ["b"]', "id must be text or an integer, not a list"),
        ('"prompt": "a", "id": null', "id must be text or an integer, not null"),
        ('"prompt": "a", "id": ' + "9" * 5000, "not a number that is infinite or too long to read"),
        ('"prompt": "a", "max_new_tokens": ' + "9" * 5000, "not a number that is infinite or too long to read"),
        ('"prompt": "a", "max_new_tokens": NaN', "max_new_tokens must be a whole number .* not NaN"),
        ('"prompt": "a", "max_new_tokens": 1e3', "max_new_tokens must be a whole number .* not 1000.0"),
        ('"prompt": "a", "max_new_tokens": null', "max_new_tokens must be a whole number .* not null"),
        ('"prompt": "a", "max_new_tokens": 4294967296', "below 2.* not 4294967296"),
        ('"prompt": "a", "max_new_tokens": "' + "z" * 500 + '"', 'not "z{39}[.]{3}$'),
        ('"prompt": {"a": 1}', "needs prompt .text, not an object. or prompt_token_ids"),
        ('"prompt_token_ids": [1, -1]', "must be a list of integers from 0"),
        ('"prompt_token_ids": [1, 99999999999]', "must be a list of integers from 0"),
        ('"prompt_token_ids": "1 2"', "must be a list of integers from 0"),
    ],
)
def test_odd_fields_of_jsonl_records(tmp_path: Path, fields: str, message: str) -> None:
    good, wrong = load_dataset(write(tmp_path, f'{{"prompt": "a"}}\n{{{fields}}}\n'), Words())
    assert isinstance(good, RequestSpec)
    assert isinstance(wrong, BadRequest)
    assert re.search(message, wrong.error)
    wrong.id.encode()  # can be written to the outputs
    assert len(wrong.error) < 200


@pytest.mark.parametrize(
    "line",
    [
        "[INST] Say hi. [/INST]",
        "[1] First, a note.",
        "[1, 2] and [3]",
        "[note]",
        "[",
        "[ x",
        "{name} is asked for a poem.",
        "{{ user }}",
        '{"a": 1} is JSON; explain it.',
        "# A title",
        "  two spaces at both ends  ",
        "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg",
        "a\rb",
        "\t",
    ],
)
def test_lines_that_are_text(tmp_path: Path, line: str) -> None:
    for end in ("\n", "\r\n"):
        records = load_dataset(write(tmp_path, f"{line}{end}{end}second{end}"), None)
        expected = ["second"] if line == "\t" else [line, "second"]
        assert [record.prompt for record in records] == expected
        assert all(isinstance(record, RequestSpec) for record in records)
        records = load_dataset(write(tmp_path, f"first{end}{line}"), None, format="text")
        assert [record.prompt for record in records] == ["first", *expected[:-1]]


@pytest.mark.parametrize("start", ["{'prompt': 'a'}", '{"prompt": "a"', '{"prompt": "a"},', '{"prompt": "a"}{"b": 1}'])
def test_malformed_jsonl_is_not_text(tmp_path: Path, start: str) -> None:
    wrong, good = load_dataset(write(tmp_path, f'{start}\n{{"prompt": "b"}}'), None)
    assert isinstance(wrong, BadRequest)
    assert "malformed JSON" in wrong.error
    assert isinstance(good, RequestSpec)


@pytest.mark.parametrize(
    "text", ["[1, ", '[{"instruction": "a"', '["a"', '[{"a": 1}]\n[{"a": 2}]', '[{"a": 1} {"a": 2}]', '["a" b]']
)
def test_malformed_alpaca_is_not_text(tmp_path: Path, text: str) -> None:
    with pytest.raises(DatasetError, match=r"malformed JSON.*say --dataset-format text"):
        load_dataset(write(tmp_path, text), Words())


def test_comments_above_jsonl(tmp_path: Path) -> None:
    text = '# prompts\n# of May\n{"prompt": "a"}\n# later\n{"prompt": "b"}'
    assert [r.prompt for r in load_dataset(write(tmp_path, text), None)] == ["a", "b"]
    title = '# Title\n{"like": "JSON"}'
    assert [r.prompt for r in load_dataset(write(tmp_path, title), None)] == title.split("\n")


def test_a_format_that_is_said_is_not_guessed(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "a"}')
    assert load_dataset(path, None)[0].prompt == "a"
    assert load_dataset(path, None, format="text")[0].prompt == '{"prompt": "a"}'
    with pytest.raises(DatasetError, match="Alpaca JSON is a list of records, not an object"):
        load_dataset(path, Words(), format="alpaca")
    with pytest.raises(DatasetError, match="malformed JSON"):
        load_dataset(write(tmp_path, "hello"), None, format="jsonl")
    with pytest.raises(DatasetError, match="is one JSON object over several lines"):
        load_dataset(write(tmp_path, '{\n"prompt": "a"\n}'), None)
    with pytest.raises(DatasetError, match='format "csv" is unknown; use one of auto, alpaca'):
        load_dataset(path, None, format="csv")  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_encodings_and_gzip(tmp_path: Path, encoding: str, packed: bool) -> None:
    for text in ("é\n日本", '{"prompt": "é"}\n{"prompt": "日本"}'):
        data = text.encode(encoding)
        records = load_dataset(write(tmp_path, gzip.compress(data) if packed else data), None)
        assert [record.prompt for record in records] == ["é", "日本"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"hello")[:-6], "the gzip file is damaged"),
        (gzip.compress(b""), "the file is empty"),
        (b"PK\x03\x04rest", "this is a zip archive; unpack it first"),
        ("hello".encode("utf-16-le"), "prompts:1: holds NUL bytes, as UTF-16 does"),
        (b"one\ntwo\0", "prompts:2: holds NUL bytes"),
        (b"\xff\xfea", "not UTF-16 at byte"),
        (b"one\rtwo\rthree", "its lines end in CR alone"),
        (b"\xef\xbb\xbf \n", "the file is empty"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    for load in (load_dataset, load_replay):
        if load is load_replay and "CR alone" in message:
            continue
        with pytest.raises(DatasetError, match=message):
            load(write(tmp_path, content), Words())


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        load_dataset(tmp_path / "none", None)
    with pytest.raises(DatasetError, match="folder"):
        load_dataset(tmp_path, None)


numbers = st.integers(-3, 9) | st.floats() | st.sampled_from([2**31, 2**64, 10**400])
strings = st.text(max_size=4) | st.text(st.characters(categories=["Cs", "Lu"]), max_size=2)
values = st.recursive(st.none() | st.booleans() | numbers | strings, st.lists, max_leaves=4)
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


fields = st.sampled_from(["instruction", "input", "output", "other"])


@settings(max_examples=150, deadline=None)
@given(records=st.lists(st.dictionaries(fields, values) | values, min_size=1, max_size=6), deep=st.booleans())
def test_every_alpaca_record_is_accounted_for_once(
    tmp_path_factory: pytest.TempPathFactory, records: list[object], deep: bool
) -> None:
    items = [json.dumps(record) for record in records] + ["[" * 2000 + "]" * 2000] * deep
    path = write(tmp_path_factory.mktemp("p"), f"[{', '.join(items)}]")
    try:
        loaded = load_dataset(path, Words(), format="alpaca")
    except DatasetError as error:
        assert f"none of its {len(items)} records" in str(error)  # noqa: PT017 (the list is another outcome)
        return
    assert [record.id for record in loaded] == [str(i) for i in range(len(items))]


@settings(max_examples=150, deadline=None)
@given(prompts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), min_size=1), min_size=1))
def test_every_line_of_text_is_a_prompt(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> None:
    kept = [prompt for prompt in prompts if prompt.strip() and not prompt.endswith("\r")]
    if not kept or kept[0].startswith("\ufeff"):
        return
    path = write(tmp_path_factory.mktemp("p"), "\n".join(prompt for prompt in kept) + "\n")
    assert [record.prompt for record in load_dataset(path, None, format="text")] == kept


pieces = st.sampled_from(
    [
        *(bytes([character]) for character in b'{}[]",:\n\r#\0'),
        *(b'{"prompt": "a"}', b'{"id": 1', b'{"instruction": "a",', b'"output"', b"\\ud800", b"NaN"),
        *(b"9" * 5000, b"[" * 3000, b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    parts=st.lists(pieces | st.binary(max_size=3), max_size=12),
    format=st.sampled_from(["auto", "alpaca", "jsonl", "text"]),
)
def test_no_file_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], format: Literal["auto", "alpaca", "jsonl", "text"]
) -> None:
    path = write(tmp_path_factory.getbasetemp(), b"".join(parts))
    for load in (lambda: load_dataset(path, Words(), format=format), lambda: load_replay(path, Words())):
        try:
            load()
        except DatasetError as error:
            assert "\n" not in str(error).replace(str(path), "")  # noqa: PT017 (loading is another outcome)


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
        '{"id": [1], "text": "a"}',
        '{"id": 1.0, "text": "a"}',
        '{"id": 1, "id": 2, "text": "a"}',
        '{"id": 1, "text": "\\ud800"}',
        '{"id": 1, "token_ids": [-1]}',
        '{"id": 1, "token_ids": [99999999999]}',
        f'{{"id": 1, "text": "a", {DEEP}}}',
        f'{{"id": {"9" * 5000}, "text": "a"}}',
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
