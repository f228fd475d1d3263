"""The engine over every backend: the same greedy texts as transformers, whatever the way of getting there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.backends.conformance.conftest import VOCAB, Model, tolerance

from isologit import LLM, GenerationRequest, RequestOutput, SamplingParams


def requests(**params: Any) -> list[GenerationRequest]:
    """Prompts that share beginnings and repeat themselves, so that prefix reuse and look-up have something to find."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, VOCAB, 40).tolist()
    made = []
    for i in range(12):
        own = rng.integers(3, VOCAB, rng.integers(1, 30)).tolist()
        prompt = [1, *shared[: 40 if i % 2 else 7], *own, *own[:5]]
        made.append(GenerationRequest(str(i), prompt, SamplingParams(max_tokens=4 + 3 * i, **params)))
    return made


def run(llm: LLM, asked: list[GenerationRequest]) -> list[RequestOutput]:
    outputs = {output.request_id: output for output in llm.run(asked)}
    return [outputs[request.request_id] for request in asked]


def check_rows(model: Model, llm: LLM, output: RequestOutput, rows: dict[int, np.ndarray]) -> None:
    """The rows of these output tokens, and every token, against the reference."""
    start = len(output.prompt_token_ids) - 1
    want = model.rows(output.prompt_token_ids + output.token_ids)[start:-1]
    for index, row in rows.items():
        assert np.abs(row - want[index]).max() < tolerance(llm.describe())


def check_greedy(model: Model, output: RequestOutput) -> None:
    start = len(output.prompt_token_ids) - 1
    assert output.token_ids == model.rows(output.prompt_token_ids + output.token_ids)[start:-1].argmax(1).tolist()


def test_greedy_texts_and_all_logits(model: Model, llm: LLM) -> None:
    for output in run(llm, requests(return_logits=True)):
        check_greedy(model, output)
        assert output.logits is not None
        check_rows(model, llm, output, dict(enumerate(output.logits)))


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 8, "enable_prefix_caching": True},
        {"max_num_seqs": 3, "max_num_batched_tokens": 5, "enable_prefix_caching": True},
        {"max_num_seqs": 12, "speculative_config": {"num_speculative_tokens": 4}},
        {"max_num_seqs": 4, "speculative_config": None},  # steps overlap, where the backend can
    ],
    ids=["prefix-reuse", "chunked-prefill", "speculation", "overlap"],
)
def test_texts_do_not_depend_on_the_options(model: Model, llm: LLM, backend_name: str, options: dict[str, Any]) -> None:
    plain = run(llm, requests())
    other = LLM(model.folder, backend=backend_name, num_threads=1, **options)
    try:
        outputs = run(other, requests())
    finally:
        other.close()
    for a, b in zip(plain, outputs, strict=True):
        assert a.token_ids == b.token_ids
        check_greedy(model, b)


def test_captured_rows(model: Model, llm: LLM) -> None:
    asked = [
        GenerationRequest(
            r.request_id, r.prompt_token_ids, r.params, capture=frozenset({0, 2, r.params.max_tokens - 1})
        )
        for r in requests(ignore_eos=True)
    ]
    for request, output in zip(asked, run(llm, asked), strict=True):
        assert set(output.captured) == request.capture
        check_rows(model, llm, output, output.captured)


def test_replay(model: Model, llm: LLM) -> None:
    rng = np.random.default_rng(3)
    recorded = rng.integers(3, VOCAB, 9).tolist()
    asked = [
        GenerationRequest(r.request_id, r.prompt_token_ids, SamplingParams(max_tokens=9), replay_token_ids=recorded,
                          capture=frozenset({0, 8}))
        for r in requests()[:4]
    ]  # fmt: skip
    for output in run(llm, asked):
        assert output.token_ids == recorded
        check_rows(model, llm, output, output.captured)


def test_logprobs_beside_plain_requests(model: Model, llm: LLM) -> None:
    """One request wants log-probabilities, the others do not."""
    asked = requests()[:5]
    asked[2] = GenerationRequest("2", asked[2].prompt_token_ids, SamplingParams(max_tokens=8, logprobs=3))
    outputs = run(llm, asked)
    found = outputs[2].logprobs
    assert found is not None
    start = len(outputs[2].prompt_token_ids) - 1
    rows = model.rows(outputs[2].prompt_token_ids + outputs[2].token_ids)[start:-1].astype(np.float64)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    for step, row in zip(found, rows, strict=True):
        assert all(abs(value - row[token]) < tolerance(llm.describe()) for token, value in step.items())
    for output in outputs:
        check_greedy(model, output)


def test_a_request_cancelled_on_the_way_leaves_no_trace(model: Model, llm: LLM) -> None:
    asked = requests(ignore_eos=True)
    outputs = {}
    for output in llm.run(asked):
        outputs[output.request_id] = output
        if len(outputs) == 2:
            gone = llm.abort("11")
            assert gone is not None
            outputs["11"] = gone
    assert outputs["11"].finish_reason == "abort"
    assert len(outputs["11"].token_ids) < asked[11].params.max_tokens
    for output in outputs.values():
        check_greedy(model, output)
