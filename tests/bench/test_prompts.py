"""What is sent: ids once each, lengths from the file, and warm-up prompts that are never timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isologit.bench.options import ServingOptions
from isologit.bench.prompts import DEMO, find_tokenizer, timed_requests, warmup_requests
from isologit.errors import DatasetError, ModelError
from isologit.workload import builtin_requests, demo_model_path


def test_default_is_the_main_jobs_prompts() -> None:
    tokenizer, name = find_tokenizer(None, None, ["isologit-demo", "llama2"])
    assert name == DEMO
    assert tokenizer is not None
    requests = timed_requests(ServingOptions(num_prompts=30), tokenizer)
    specs = builtin_requests(30)
    assert [(r.id, r.prompt, r.max_new_tokens) for r in requests] == [(s.id, s.prompt, s.max_new_tokens) for s in specs]
    assert requests[0].prompt_len == len(tokenizer.encode(specs[0].prompt or ""))


def test_alpaca_lengths_are_counted_by_the_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps([{"instruction": "Name", "input": "it", "output": "a cat sat"}]))
    tokenizer, _ = find_tokenizer(demo_model_path(), None)
    assert tokenizer is not None
    (request,) = timed_requests(ServingOptions(dataset_path=file), tokenizer)
    assert request.prompt == "Name:it"
    assert request.max_new_tokens == len(tokenizer.encode_without_bos("a cat sat"))


def test_the_format_of_a_file_may_be_said(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_text('{"prompt": "a"}\n')
    for options, prompt in (
        (ServingOptions(dataset_path=file), "a"),
        (ServingOptions(dataset_path=file, dataset_format="text"), '{"prompt": "a"}'),
    ):
        assert [request.prompt for request in timed_requests(options, None)] == [prompt]


def test_a_short_file_is_gone_through_again_under_new_ids(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_text("one\ntwo\n")
    requests = timed_requests(ServingOptions(dataset_path=file, num_prompts=5, max_new_tokens=9), None)
    assert [r.prompt for r in requests] == ["one", "two", "one", "two", "one"]
    assert [r.id for r in requests] == ["0", "1", "0~1", "1~1", "0~2"]
    assert {r.max_new_tokens for r in requests} == {9}
    assert {r.prompt_len for r in requests} == {None}
    assert len(timed_requests(ServingOptions(dataset_path=file), None)) == 2


def test_a_record_that_cannot_be_sent_is_refused_not_skipped(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(DatasetError, match=r"lines\.jsonl:2.*every record"):
        timed_requests(ServingOptions(dataset_path=file), None)


def test_token_ids_go_to_openai_only(tmp_path: Path) -> None:
    file = tmp_path / "ids.jsonl"
    file.write_text('{"prompt_token_ids": [1, 2, 3], "max_new_tokens": 4}\n')
    (request,) = timed_requests(ServingOptions(dataset_path=file, backend="openai"), None)
    assert (request.prompt, request.prompt_token_ids, request.prompt_len) == (None, [1, 2, 3], 3)
    with pytest.raises(DatasetError, match="--backend openai"):
        timed_requests(ServingOptions(dataset_path=file), None)


def test_warmup_prompts_are_not_timed() -> None:
    timed = timed_requests(ServingOptions(num_prompts=200), None)
    warm = warmup_requests(40, timed, 0)
    assert len(warm) == 40
    assert not {r.prompt for r in warm} & {r.prompt for r in timed}
    clashing = warmup_requests(3, warm, 0)  # the first 40 it would draw are all taken
    assert not {r.prompt for r in clashing} & {r.prompt for r in warm}


def test_tokens_of_a_model_known_by_name_are_not_guessed(tmp_path: Path) -> None:
    assert find_tokenizer(None, "some/model") == (None, None)
    assert find_tokenizer(None, None, ["some/model", "llama2"]) == (None, None)
    assert find_tokenizer(None, None) == (None, None)
    assert find_tokenizer(None, str(demo_model_path()))[1] == str(demo_model_path())
    with pytest.raises(ModelError, match="holds no tokenizer"):
        find_tokenizer(tmp_path, None)
