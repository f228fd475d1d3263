"""What HTTP adds: medians against the offline run's, and other answers are seen."""

from __future__ import annotations

import json

import pytest
from benchmarks.serving_overhead import WHOLE, read_answer, summarise, table

from isologit.bench.dialects import DIALECTS

OFFLINE = [
    {"seconds": seconds, "cpu_s": 20.0, "output_tokens": 100, "texts_sha256": "a"} for seconds in (10.0, 9.0, 30.0)
]


def served(seconds: float, tokens: int = 100, texts: str = "a") -> dict[str, object]:
    spent = {"seconds": seconds, "server_cpu_s": 20.0, "client_cpu_s": 1.0}
    return {**spent, "output_tokens": tokens, "texts_sha256": texts}


def test_medians_are_compared() -> None:
    found = summarise(("tgi", "stream"), [served(10.4), served(99.0), served(10.1)], OFFLINE)
    assert (found["backend"], found["way"]) == ("tgi", "stream")
    assert (found["seconds"], found["ratio"], found["cpu_ratio"]) == (10.4, 1.04, 1.05)
    assert found["within_bar"]
    assert found["equal_answers"]
    offline = {"seconds": 10.0, "cpu_s": 20.0}
    last = table({"offline": offline, "cases": [found]})[-1]
    assert last == "| tgi, streams | 10.40 | +4.0 % | 21.0 | +5.0 % |"


def test_a_slow_server_or_other_answers_are_said() -> None:
    assert not summarise(("tgi", "stream"), [served(10.6)], OFFLINE)["within_bar"]
    for other in (served(10.0, tokens=99), served(10.0, texts="b")):
        found = summarise(("tgi", "stream"), [other], OFFLINE)
        assert not found["equal_answers"]
        assert "NOT comparable" in table({"offline": {"seconds": 10.0, "cpu_s": 20.0}, "cases": [found]})[-1]


def test_every_protocol_that_is_not_a_chat_is_measured() -> None:
    assert set(WHOLE) == set(DIALECTS) - {"openai-chat"}


def lines(*values: object, lead: str = "data:") -> bytes:
    return "".join(f"{lead}{json.dumps(value)}\n\n" for value in values).encode()


OPENAI = {"choices": [{"text": "a b", "finish_reason": "length"}], "usage": {"completion_tokens": 2}}
TGI_TOKEN = {"token": {"id": 1, "text": "a"}, "generated_text": None, "details": None}
TGI_LAST = {
    "token": {"id": 2, "text": " b"},
    "generated_text": "a b",
    "details": {"finish_reason": "length", "generated_tokens": 2},
}
CONTEST = {"generated_text": "a b", "finish_reason": "length", "generated_tokens": 2, "details": None}


@pytest.mark.parametrize(
    ("backend", "streams", "content"),
    [
        ("openai", False, json.dumps(OPENAI).encode()),
        ("openai", True, lines({"choices": [{"text": "a", "finish_reason": None}]}, OPENAI | {"choices": [
            {"text": " b", "finish_reason": "length"}]})),
        ("tgi", False, json.dumps({"generated_text": "a b", "details": {"generated_tokens": 2}}).encode()),
        ("tgi", True, lines(TGI_TOKEN, TGI_LAST)),
        ("llm-serving", False, json.dumps(CONTEST).encode()),
        ("llm-serving", True, lines({"data": [{"generated_text": "a"}]}, {"data": [CONTEST]}, lead="")),
    ],
)  # fmt: skip
def test_an_answer_is_read_in_every_protocol(backend: str, streams: bool, content: bytes) -> None:
    assert read_answer(content, backend, streams) == ("a b", 2)
