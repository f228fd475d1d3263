"""Sampling parameters are validated with the field's name; a sequence knows its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from isologit.engine.request import GenerationRequest, SamplingParams, Sequence, SequenceStatus
from isologit.errors import RequestError


def test_default_is_greedy() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.7).greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("logprobs", -1),
        ("ignore_eos", 1),
        ("return_logits", None),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", None),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 3),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", math.nan),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", [1]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("bad_words", "fox"),
        ("bad_words", [""]),
        ("prompt_logprobs", -1),
        ("include_stop_str_in_output", 1),
    ],
)
def test_a_bad_value_is_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be .*, not ") as error:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_edges_of_the_ranges_are_allowed() -> None:
    SamplingParams(max_tokens=1, min_tokens=1, top_k=-1, top_p=1.0, seed=0, logprobs=0)
    SamplingParams(max_tokens=int(np.int64(3)), temperature=1e-6, top_p=1e-6, repetition_penalty=1e-6)


def test_stops_become_tuples() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2])
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1, 2))
    assert hash(params) == hash(SamplingParams(stop=("a", "b"), stop_token_ids=(1, 2)))


def test_sequence_starts_with_its_prompt_and_does_not_share_it() -> None:
    request = GenerationRequest("a", [5, 6, 7], SamplingParams(max_tokens=4))
    seq = Sequence(request)
    assert (seq.num_prompt_tokens, seq.max_total_tokens, seq.forced_tokens) == (3, 7, None)
    assert (seq.status, seq.num_output_tokens, seq.output_token_ids) == (SequenceStatus.WAITING, 0, [])
    seq.token_ids.append(8)
    assert (seq.num_output_tokens, seq.output_token_ids) == (1, [8])
    assert request.prompt_token_ids == [5, 6, 7]


@pytest.mark.parametrize(("recorded", "total"), [(0, 3), (2, 5), (4, 7), (9, 7)])
def test_a_replay_is_as_long_as_its_record_or_max_tokens(recorded: int, total: int) -> None:
    request = GenerationRequest("a", [5, 6, 7], SamplingParams(max_tokens=4), replay_token_ids=[1] * recorded)
    assert Sequence(request).max_total_tokens == total


@pytest.mark.parametrize(
    ("params", "replay", "argmax_from"),
    [
        (SamplingParams(max_tokens=4), None, 3),
        (SamplingParams(max_tokens=4, min_tokens=2), None, 5),
        (SamplingParams(max_tokens=4, temperature=1.0), None, 7),
        (SamplingParams(max_tokens=4, repetition_penalty=1.2), None, 7),
        (SamplingParams(max_tokens=4, temperature=1.0), [1, 2], 3),
    ],
)
def test_drafts_are_allowed_only_where_the_argmax_decides(
    params: SamplingParams, replay: list[int] | None, argmax_from: int
) -> None:
    assert Sequence(GenerationRequest("a", [5, 6, 7], params, replay_token_ids=replay)).argmax_from == argmax_from
