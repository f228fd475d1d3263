"""What changes a row of logits, in the order and with the meaning of vLLM; and scores of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from isologit import LLM, GenerationRequest, RequestOutput, SamplingParams
from isologit.engine.sampler import Sampler, bad_word_tokens
from isologit.text.tokenizer import load_tokenizer
from isologit.workload import demo_model_path

ROW = np.array([1.0, 3.0, -2.0, 0.5, 2.5, 2.9], np.float32)
PROMPT = "Describe the fox.\n"


def choose(output: tuple[int, ...] = (), *, prompt: tuple[int, ...] = (2,), bad: Any = (), **params: Any) -> int:
    sampler = Sampler(SamplingParams(max_tokens=9, **params), np.random.default_rng(0), stop_ids=[1])
    sampler._bad_words = list(map(list, bad))
    return sampler.choose(ROW, [*prompt, *output], len(prompt))


def drawn(**params: Any) -> set[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, **params), np.random.default_rng(0))
    return {sampler.choose(ROW, [2], 1) for _ in range(400)}


def test_each_parameter_moves_the_argmax() -> None:
    assert choose() == 1
    assert choose(logit_bias={3: 2.6}) == 3
    assert choose(logit_bias={3: 1e9}) == 3
    assert choose(allowed_token_ids=[0, 2, 3]) == 0
    assert choose(bad=[(1,)]) == 5
    assert choose(output=(4,), bad=[(4, 1)]) == 5
    assert choose(output=(5,), bad=[(4, 1)]) == 1
    assert choose(output=(1,), presence_penalty=0.2) == 5
    assert choose(output=(1, 5, 5), frequency_penalty=0.2) == 1
    assert choose(output=(1, 1, 5), frequency_penalty=0.2) == 5
    assert choose(output=(1,), repetition_penalty=1.1) == 5
    assert choose(min_tokens=2) == 5, "no stop may come yet"
    assert choose(output=(3, 3), min_tokens=2) == 1


def test_penalties_of_the_output_leave_the_prompt_alone_and_repetition_does_not() -> None:
    assert choose(prompt=(1, 1), presence_penalty=2.0, frequency_penalty=2.0) == 1
    assert choose(prompt=(1, 1), repetition_penalty=1.5) == 5


def test_the_order_is_bias_then_repetition_then_the_other_penalties() -> None:
    biased = 3.0 - 4.0  # negative, so that repetition multiplies; the other order would give 3 / 2 - 4
    assert biased * 2.0 - 1.0 == -3.0
    sampler = Sampler(
        SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={1: -4.0}), np.random.default_rng(0)
    )
    logits = ROW.astype(np.float64)
    sampler._adjust(logits, [2, 1], [1])
    assert logits[1] == -3.0


def test_min_p_keeps_what_is_likely_beside_the_likeliest() -> None:
    assert drawn() >= {0, 1, 3, 4, 5}
    assert drawn(min_p=float(np.exp(-0.2))) == {1, 5}
    assert drawn(min_p=1.0) == {1}
    assert drawn(min_p=float(np.exp(-0.6)), top_k=2) == {1, 5}


def test_when_every_token_is_out_one_still_comes() -> None:
    assert choose(allowed_token_ids=[3], bad=[(3,)]) == 3
    assert choose(allowed_token_ids=[1], min_tokens=1) == 1
    assert choose(allowed_token_ids=[1], min_tokens=1, temperature=1.0) == 1


def test_bad_words_are_found_alone_and_after_a_space() -> None:
    tokenizer = load_tokenizer(demo_model_path())
    assert tokenizer is not None
    for tokens in bad_word_tokens(["fox", " owl"], tokenizer):
        assert tokenizer.decode(tokens).strip() in ("fox", "owl")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    found = LLM(num_threads=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)


def log_softmax(reference: LlamaForCausalLM, ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocab]; row i predicts token i + 1."""
    with torch.no_grad():
        found: np.ndarray = reference(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    return found


def one(llm: LLM, prompt: Any = PROMPT, **params: Any) -> RequestOutput:
    [output] = llm.generate(prompt, SamplingParams(**params))
    return output


def test_through_the_engine_every_parameter_does_what_it_says(llm: LLM) -> None:
    assert llm.tokenizer is not None
    free = one(llm, max_tokens=30, ignore_eos=True)
    first, second = free.token_ids[:2]
    assert first not in one(llm, max_tokens=30, ignore_eos=True, logit_bias={first: -100.0}).token_ids
    allowed = sorted(set(free.token_ids))[::2]
    assert set(one(llm, max_tokens=30, ignore_eos=True, allowed_token_ids=allowed).token_ids) <= set(allowed)
    word = llm.tokenizer.decode([first, second]).strip()
    for tokens in bad_word_tokens([word], llm.tokenizer):
        found = one(llm, max_tokens=30, ignore_eos=True, bad_words=[word]).token_ids
        assert all(found[i : i + len(tokens)] != tokens for i in range(len(found)))
    assert len(set(one(llm, max_tokens=30, ignore_eos=True, presence_penalty=2.0).token_ids)) >= len(
        set(free.token_ids)
    )
    assert one(llm, max_tokens=30, ignore_eos=True, temperature=5.0, min_p=1.0).token_ids == free.token_ids


def test_speculation_gives_what_plain_steps_give(llm: LLM) -> None:
    plain = LLM(num_threads=1, speculative_config=None)
    for params in (
        {"frequency_penalty": 0.5}, {"presence_penalty": 1.0}, {"logit_bias": {5: 3.0, 9: -3.0}},
        {"allowed_token_ids": list(range(0, 200, 2))}, {"bad_words": ["the", "fox"]}, {"min_tokens": 20},
    ):  # fmt: skip
        asked = {"max_tokens": 40, "ignore_eos": True, **params}
        assert (
            one(plain, "Count from 3 to 20.\n", **asked).token_ids
            == one(llm, "Count from 3 to 20.\n", **asked).token_ids
        )
    plain.close()


@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_prompt_logprobs_are_those_of_the_reference(
    reference: LlamaForCausalLM, rows: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, several requests at once, with a prefix that the cache knows."""
    monkeypatch.setattr("isologit.engine.scheduler._MOST_SCORED_ROWS", 40)
    llm = LLM(num_threads=1, max_num_seqs=4, max_num_batched_tokens=rows)
    rng = np.random.default_rng(0)
    shared = [1, *rng.integers(3, llm.config.vocab_size, 50).tolist()]
    prompts = [[1], [1, 7], *([*shared, *rng.integers(3, llm.config.vocab_size, n).tolist()] for n in (0, 9, 30))]
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=2, logprobs=1, ignore_eos=True)
    scored = [GenerationRequest(str(i), ids, params) for i, ids in enumerate(prompts)]
    plain = GenerationRequest("plain", shared, SamplingParams(max_tokens=3, ignore_eos=True))
    outputs = {
        output.request_id: output
        for output in llm.run(
            [
                plain,
                *scored,
            ]
        )
    }
    assert outputs["plain"].prompt_logprobs is None
    for number, ids in enumerate(prompts):
        output = outputs[str(number)]
        assert output.finish_reason == "length"
        assert len(output.token_ids) == max_tokens
        found = output.prompt_logprobs
        assert found is not None
        assert len(found) == len(ids)
        assert found[0] is None
        theirs = log_softmax(reference, [*ids, *output.token_ids])
        for place, entry in enumerate(found[1:], 1):
            assert entry is not None
            assert ids[place] in entry
            assert len(entry) in (2, 3)
            for token, value in entry.items():
                assert abs(value - theirs[place - 1, token]) < 1e-4
        for place, chosen in enumerate(output.logprobs or [], len(ids)):
            assert abs(chosen[output.token_ids[place - len(ids)]] - theirs[place - 1].max()) < 1e-4
    llm.close()


def test_max_tokens_0_without_scores_computes_nothing(llm: LLM) -> None:
    output = one(llm, max_tokens=0)
    assert (output.token_ids, output.text, output.finish_reason) == ([], "", "length")
    assert llm.step_records == []


def test_a_step_never_holds_more_scored_rows_than_its_bound(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isologit.engine.scheduler._MOST_SCORED_ROWS", 16)
    ids = [1, *range(3, 103)]
    outputs = llm.generate([{"prompt_token_ids": ids}] * 3, SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert [len(output.prompt_logprobs or []) for output in outputs] == [101] * 3
    assert max(record.num_logits for record in llm.step_records) == 16
