"""How requests end, and what their outputs hold, through the whole engine with the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from isologit import LLM, GenerationRequest, RequestOutput, SamplingParams
from isologit.engine.captured_rows import LAST_TOKEN

PROMPT = "Describe the fox.\n"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    found = LLM(num_threads=1)
    yield found
    found.close()


def one(llm: LLM, prompt: str = PROMPT, **params: Any) -> RequestOutput:
    [output] = llm.generate(prompt, SamplingParams(**params))
    return output


def streamed(llm: LLM, params: SamplingParams) -> tuple[list[str], str, RequestOutput]:
    """Texts of the tokens, what was shown, and the result, as a server gets them."""
    loop = llm.open_loop()
    assert llm.tokenizer is not None
    loop.add(GenerationRequest("r", llm.tokenizer.encode(PROMPT), params))
    texts: list[str] = []
    shown = ""
    while loop.has_work():
        finished = loop.step()
        for delta in loop.deltas:
            texts += delta.texts
            shown += "".join(delta.shown)
    return texts, shown, finished[0]


def stop_of(llm: LLM, after: int) -> str:
    """A string that the free answer completes with the token after the first `after`."""
    texts, _, _ = streamed(llm, SamplingParams(max_tokens=40))
    return "".join(texts[after - 1 : after + 1])


def test_a_stop_string_is_looked_for_beyond_min_tokens_only(llm: LLM) -> None:
    stop = stop_of(llm, 2)
    early = one(llm, max_tokens=40, stop=[stop])
    assert (early.finish_reason, early.stop_reason) == ("stop", stop)
    assert len(early.token_ids) < 10
    late = one(llm, max_tokens=40, stop=[stop], min_tokens=10)
    assert len(late.token_ids) >= 10
    assert late.text.startswith(early.text + stop)


def test_a_stop_string_that_the_last_allowed_token_completes_is_a_stop(llm: LLM) -> None:
    stop = stop_of(llm, 5)
    count = len(one(llm, max_tokens=40, stop=stop).token_ids)
    output = one(llm, max_tokens=count, stop=stop)
    assert (output.finish_reason, output.stop_reason, len(output.token_ids)) == ("stop", stop, count)
    assert one(llm, max_tokens=count - 1, stop=stop).finish_reason == "length"


def test_a_special_token_as_a_stop_string(llm: LLM) -> None:
    assert llm.tokenizer is not None
    name = llm.tokenizer.token_name(llm.config.eos_token_ids[0])
    free = one(llm, max_tokens=200)
    assert free.stop_reason is None
    output = one(llm, max_tokens=200, stop=name, ignore_eos=True)
    assert (output.token_ids, output.text) == (free.token_ids, free.text)
    assert (output.finish_reason, output.stop_reason) == ("stop", name)


@pytest.mark.parametrize("include", [False, True])
def test_streams_and_whole_answers_agree_and_spans_are_those_of_the_free_text(llm: LLM, include: bool) -> None:
    free, _, _ = streamed(llm, SamplingParams(max_tokens=40))
    stop = stop_of(llm, 6)
    params = SamplingParams(max_tokens=40, stop=[stop, "never"], include_stop_str_in_output=include)
    texts, shown, output = streamed(llm, params)
    [offline] = llm.generate(PROMPT, params)
    whole = "".join(free)
    assert texts == free[: len(texts)]
    end = whole.index(stop) + (len(stop) if include else 0)
    assert shown == output.text == offline.text == whole[:end]
    assert output.token_ids == offline.token_ids


def test_speculation_and_stop_strings_give_what_plain_steps_give(llm: LLM) -> None:
    plain = LLM(num_threads=1, speculative_config=None)
    for prompt in ("Count from 3 to 20.\n", PROMPT):
        text = one(plain, prompt, max_tokens=60).text
        for start in range(5, len(text) - 3, 9):
            params = {"max_tokens": 60, "stop": text[start : start + 3], "return_logits": True}
            a, b = one(plain, prompt, **params), one(llm, prompt, **params)
            assert (a.token_ids, a.text, a.finish_reason, a.stop_reason) == (
                b.token_ids, b.text, b.finish_reason, b.stop_reason,
            )  # fmt: skip
            assert a.logits is not None
            assert np.array_equal(a.logits, b.logits)
            assert len(a.logits) == len(a.token_ids)
    plain.close()


def test_the_last_row_is_captured_when_a_stop_string_ends_the_output(llm: LLM) -> None:
    assert llm.tokenizer is not None
    params = SamplingParams(max_tokens=40, stop=stop_of(llm, 5), return_logits=True)
    request = GenerationRequest("r", llm.tokenizer.encode(PROMPT), params, capture=frozenset({0, LAST_TOKEN}))
    [output] = llm.run([request])
    assert output.logits is not None
    assert set(output.captured) == {0, len(output.token_ids) - 1}
    for index, row in output.captured.items():
        assert np.array_equal(row, output.logits[index])


def test_captured_rows_are_logits_at_all_times(llm: LLM) -> None:
    """Those of an output that waits for others as well; what the LM head reads is kept elsewhere."""
    assert llm.tokenizer is not None
    loop = llm.open_loop()
    ids = llm.tokenizer.encode(PROMPT)
    loop.add(GenerationRequest("short", ids, SamplingParams(max_tokens=2), capture=frozenset({0})))
    loop.add(GenerationRequest("long", ids, SamplingParams(max_tokens=6)))
    outputs: list[RequestOutput] = []
    while loop.has_work():
        outputs += loop.step()
        for output, _ in loop._captured._held:
            assert all(row.shape == (llm.config.vocab_size,) for row in output.captured.values())
    assert {output.request_id: list(output.captured) for output in outputs} == {"short": [0], "long": []}


def test_offline_text_without_stops_is_decoded_when_the_request_is_over(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llm.tokenizer is not None
    decoded: list[int] = []
    decode = type(llm.tokenizer)._decode
    monkeypatch.setattr(llm.tokenizer, "_decode", lambda ids: decoded.append(len(ids)) or decode(llm.tokenizer, ids))
    output = one(llm, max_tokens=30)
    assert decoded == [len(output.token_ids)] or decoded == [len(output.token_ids) - 1]
