"""The built-in model and prompts: real, readable, and of the contest's lengths."""

from __future__ import annotations

import json

import pytest
import sentencepiece

from isologit import LLM, SamplingParams
from isologit.workload import builtin_requests, contest_lengths, demo_model_path


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(demo_model_path() / "tokenizer.model"))


def test_the_trace_has_the_totals_of_the_contest() -> None:
    lengths = contest_lengths()
    assert len(lengths) == 1500
    assert sum(prompt for prompt, _ in lengths) == 31_425
    assert sum(new for _, new in lengths) == 98_086
    assert max(prompt + new for prompt, new in lengths) == 512


def test_the_demo_model_is_a_small_grouped_query_llama() -> None:
    config = json.loads((demo_model_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert (demo_model_path() / "model.safetensors").stat().st_size < 8 << 20


def test_prompts_follow_the_length_profile(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    requests = builtin_requests()
    assert [r.max_new_tokens for r in requests] == [new for _, new in contest_lengths()]
    assert len({r.id for r in requests}) == 1500
    wanted = [prompt for prompt, _ in contest_lengths()]
    got = [len(tokenizer.encode(r.prompt)) + 1 for r in requests]
    assert abs(sum(got) / sum(wanted) - 1) < 0.05
    exact = [w == g for w, g in zip(wanted, got, strict=True) if w >= 12]
    assert sum(exact) > 0.95 * len(exact)


def test_prompts_are_reproducible_and_other_seeds_give_others() -> None:
    first = [r.prompt for r in builtin_requests(200)]
    assert first == [r.prompt for r in builtin_requests(200)]
    other = {r.prompt for r in builtin_requests(200, seed=1)}
    assert len(set(first) - other) > 100
    assert [r.prompt for r in builtin_requests(1502)][1500:] != []


def test_answers_are_readable_and_end_by_eos_or_length() -> None:
    llm = LLM(demo_model_path(), num_threads=1)
    requests = builtin_requests(60)
    try:
        outputs = llm.generate([r.prompt or "" for r in requests], SamplingParams(max_tokens=80), use_tqdm=False)
        told = llm.generate("Is the fox one of the animals? Answer yes or no.\n", SamplingParams(max_tokens=8))
    finally:
        llm.close()
    assert {"stop", "length"} == {o.finish_reason for o in outputs}
    words = {word.strip('.,:?!"') for o in outputs for word in o.text.split()}
    assert {"the", "The", "is"} <= words
    assert told[0].text in ("Yes.", "No.")
