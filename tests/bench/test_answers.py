"""What servers really send: an answer counts with the server's own numbers, or fails with the reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tests.bench.fake_server import fake_server, sse
from tests.bench.records import record

from isologit.bench.answers import problem_with
from isologit.bench.dialects import DIALECTS, LoadRequest
from isologit.bench.load import run_load
from isologit.bench.metrics import measure, output_lengths
from isologit.bench.records import LoadPlan, LoadRun, RequestRecord
from isologit.bench.verdict import judge

DONE = b"data: [DONE]\n\n"
LIMIT = 4


def ask(
    backend: str,
    answer: Sequence[bytes],
    *,
    token_s: float = 0.0,
    ignore_eos: bool = False,
    timeout_s: float | None = None,
) -> LoadRun:
    """One request of four tokens to a server that sends these bytes."""
    with fake_server(answer=answer, token_s=token_s) as server:
        dialect = DIALECTS[backend]
        plan = LoadPlan(
            url=server.url + dialect.endpoint.format(model="m"),
            dialect=dialect,
            model="m",
            requests=[LoadRequest("r", "hello", None, None, LIMIT)],
            arrival_s=np.zeros(1),
            ignore_eos=ignore_eos,
            request_timeout_s=timeout_s,
        )
        return run_load(plan)


def the(run: LoadRun) -> RequestRecord:
    """Its record; the verdict agrees with it."""
    (one,) = run.records
    assert (judge(run).status == "INVALID") == (one.status == "failed")
    return one


def text(piece: str | None, reason: str | None = None, **more: Any) -> bytes:
    """A chunk of a completion."""
    return sse({"choices": [{"index": 0, "text": piece, "finish_reason": reason}], **more})


def delta(value: Any, reason: str | None = None, **more: Any) -> bytes:
    """A chunk of a chat."""
    return sse({"choices": [{"index": 0, "delta": value, "finish_reason": reason}], **more})


def usage(count: int | None, prompt: int | None = 11) -> bytes:
    """The chunk with the counts."""
    return sse({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": count}})


def tgi(word: str | None, **more: Any) -> bytes:
    """An event of TGI."""
    token = None if word is None else {"id": 1, "text": word, "special": False}
    return sse({"index": 1, "token": token, "generated_text": None, "details": None, **more})


def line(**inner: Any) -> bytes:
    """A line of the contest's server."""
    return json.dumps({"event": "message", "data": [inner]}).encode() + b"\n"


WORDS = [text("a "), text("b "), text("c "), text("d")]


@pytest.mark.parametrize(
    ("backend", "answer", "message"),
    [
        ("openai", [DONE], "holds no token"),
        ("openai-chat", [DONE], "holds no token"),
        ("openai-chat", [delta({"role": "assistant", "content": ""}), DONE], "holds no token"),
        ("openai", [text("", "length"), usage(4), DONE], "holds no token"),
        ("openai", [text("", "stop"), usage(4), DONE], "counts 4 output tokens and streamed none"),
        ("llm-serving", [line(generated_text="", finish_reason="length", generated_tokens=4)], "holds no token"),
        ("llm-serving", [line(generated_text="a b", finish_reason="eos", generated_tokens=2)], "streamed none"),
        ("tgi", [tgi(None, generated_text="", details={"finish_reason": "length"})], "holds no token"),
        ("openai", [b""], "broke off"),
        ("openai", [b": ping\n\n" * 3], "broke off"),
        ("openai", [*WORDS], "broke off"),
        ("openai", [*WORDS, text("", "abort"), DONE], "ended the answer with 'abort'"),
        ("openai", [*WORDS, text("", "content_filter"), DONE], "content_filter"),
        ("openai", [WORDS[0], sse({"error": {"message": "out of memory"}}), DONE], "out of memory"),
        ("openai", [WORDS[0], b"event: error\n" + sse({"error": "out of memory"})], "out of memory"),
        ("tgi", [tgi("a"), sse({"error": "Request failed", "error_type": "generation"})], "Request failed"),
        ("openai", [WORDS[0], b"data: {}\n\n", DONE], "not of this protocol"),
        ("openai", [text("a", "length", usage={"completion_tokens": -1}), DONE], "not of this protocol"),
    ],
)  # fmt: skip
def test_what_is_no_whole_answer_fails_with_the_reason(backend: str, answer: list[bytes], message: str) -> None:
    one = the(ask(backend, answer))
    assert one.status == "failed"
    assert message in (one.error or "")


WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("openai", {"choices": [{"text": "a b c d", "finish_reason": "length"}], "usage": {"completion_tokens": 4}}),
    ("openai-chat", {"choices": [{"message": {"content": "a b c d"}, "finish_reason": "length"}]}),
    ("tgi", {"generated_text": "a b c d", "details": {"finish_reason": "length", "generated_tokens": 4}}),
]


@pytest.mark.parametrize(("backend", "body"), WHOLE)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_server_that_does_not_stream_is_named(backend: str, body: dict[str, Any], end: bytes) -> None:
    one = the(ask(backend, [json.dumps(body).encode() + end]))
    assert one.status == "failed"
    assert "did not stream" in (one.error or "")


def test_an_error_in_one_piece_keeps_its_own_words() -> None:
    one = the(ask("openai", [b'{"error": {"message": "no such model"}}']))
    assert one.error == "the server reported an error: no such model"


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ([*WORDS, text("", "length"), usage(4), DONE], 4),
        ([*WORDS, text(None, "length"), usage(4), DONE], 4),
        ([*WORDS, text("", "length", usage={"completion_tokens": 4}), DONE], 4),
        ([*(text("a", usage={"completion_tokens": i + 1}) for i in range(4)), text("", "length"), DONE], 4),
        ([text("a b c d", "length", usage=None), usage(4), DONE], 4),
        ([text("a", usage=None, error=None), text("b", "stop"), sse({"choices": None, "usage": None}), DONE], None),
        ([*WORDS, DONE], None),  # no reason
        ([*WORDS, text("", "length")], None),  # no [DONE]
        ([*WORDS, text("", "length"), usage(None), DONE], None),
        ([*WORDS, text("", "length"), usage(0), DONE], None),  # a count that was never made
        ([b": ping\r\n\r\n", *(piece.replace(b"\n", b"\r\n") for piece in WORDS), b"data:[DONE]\r\n\r\n"], None),
        ([*WORDS, text("", "length"), usage(4), DONE, b"goodbye\n"], 4),
        ([sse({"choices": [{"text": "a"}, {"text": "b"}]}), text("", "stop"), usage(2), DONE], 2),
        ([text("", "stop"), usage(1), DONE], 1),  # the model stopped at once
        ([text("", "stop"), usage(0), DONE], 0),
    ],
)
def test_completions_as_servers_send_them(answer: list[bytes], tokens: int | None) -> None:
    one = the(ask("openai", answer))
    assert (one.status, one.error) == ("completed", None)
    assert one.reported_tokens == tokens


def _call(**function: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": function}]}


CHATS: list[tuple[list[Any], str, int]] = [
    ([{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}], "ab", 2),
    ([{"role": "assistant", "content": None}, {"reasoning_content": "think "}, {"content": "b"}], "think b", 2),
    ([{"reasoning": "think ", "content": None}, {"reasoning": None, "content": "b"}], "think b", 2),
    ([{"reasoning": "x ", "reasoning_content": "x "}, {"content": "b"}], "x b", 2),
    ([None, {"content": "a"}, None, {}], "a", 1),
    ([_call(name="f", arguments=""), _call(arguments="{}")], "f{}", 2),
    ([{"tool_calls": None, "function_call": None, "refusal": "no"}], "no", 1),
]


@pytest.mark.parametrize(("deltas", "written", "messages"), CHATS)
def test_everything_a_model_writes_in_a_chat_counts(deltas: list[Any], written: str, messages: int) -> None:
    one = the(ask("openai-chat", [*map(delta, deltas), delta({}, "stop"), usage(messages), DONE]))
    assert (one.status, one.error) == ("completed", None)
    assert one.text == written
    assert len(one.token_times_s) == messages


def test_the_first_token_of_a_model_that_reasons_is_its_first_thought() -> None:
    thoughts = [delta({"reasoning_content": f"t{i} "}) for i in range(3)]
    run = ask("openai-chat", [*thoughts, delta({"content": "x"}), delta({}, "stop"), usage(4), DONE], token_s=0.05)
    figures = measure(run, output_lengths(run.records, None))
    assert figures["mean_ttft_ms"] < 110 + 60
    assert figures["mean_tpot_ms"] > 45
    assert figures["total_output_tokens"] == 4


def test_chunks_of_several_tokens_have_the_servers_count_and_time_per_token() -> None:
    """20 tokens at 10 ms each, two a message: whoever counts words or messages gets another number."""
    pieces = [text("ab cd ef gh ") for _ in range(10)]
    run = ask("openai", [*pieces, text("", "stop"), usage(20), DONE], token_s=0.02)
    figures = measure(run, output_lengths(run.records, None))
    assert figures["total_output_tokens"] == 20
    assert figures["total_input_tokens"] == 11
    assert figures["mean_tpot_ms"] == pytest.approx(10, rel=0.5)
    assert judge(run).status != "INVALID"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([*WORDS, text("", "length"), usage(4), DONE], None),
        ([*WORDS, text("", "stop"), usage(4), DONE], None),
        ([*WORDS, text("", "length"), DONE], None),
        ([*WORDS[:2], text("", "length"), usage(2), DONE], "2 of 4 tokens"),
        ([*WORDS[:2], text("", "stop"), usage(2), DONE], "2 of 4 tokens"),
        ([*WORDS, *WORDS, text("", "length"), usage(8), DONE], "8 of 4 tokens"),
        ([*WORDS[:2], text("", "stop"), DONE], "nothing says that all 4"),
        ([*WORDS[:2], DONE], "nothing says that all 4"),
        ([text("", "stop"), usage(1), DONE], "1 of 4 tokens"),
    ],
)
def test_with_ignore_eos_all_tokens_are_due(answer: list[bytes], problem: str | None) -> None:
    one = the(ask("openai", answer, ignore_eos=True))
    assert (one.error is None) if problem is None else (problem in (one.error or ""))


def test_without_ignore_eos_a_short_answer_counts() -> None:
    """The inverse."""
    assert problem_with(record(reported_tokens=2, finish_reason="stop"), ignore_eos=False) is None
    assert problem_with(record(reported_tokens=2, finish_reason="stop"), ignore_eos=True)


def test_nulls_of_the_other_dialects_are_nothing() -> None:
    end = tgi(
        "b", generated_text="ab", details={"finish_reason": "eos_token", "generated_tokens": 2, "input_length": 9}
    )
    one = the(ask("tgi", [tgi("a"), tgi(None), end.replace(b'"details"', b'"error": null, "details"')]))
    assert (one.status, one.reported_tokens, one.reported_prompt_tokens) == ("completed", 2, 9)
    assert (one.text, len(one.token_times_s)) == ("ab", 2)
    one = the(ask("tgi", [tgi("a"), tgi("b", generated_text="ab")]))
    assert (one.status, one.reported_tokens) == ("completed", None)
    last = line(generated_text="ab", finish_reason="eos", generated_tokens=None)
    answer = [line(generated_text="a", finish_reason=None), line(generated_text=None), line(generated_text="b"), last]
    one = the(ask("llm-serving", answer))
    assert (one.status, one.text, one.reported_tokens) == ("completed", "ab", None)
    assert len(one.token_times_s) == 2


def test_a_request_past_its_time_has_failed_alone() -> None:
    answer = [*WORDS, text("", "length"), DONE]
    one = the(ask("openai", answer, token_s=0.2, timeout_s=0.5))
    assert one.error == "not answered whole within 0.5 s (--request-timeout)"
    assert one.finished_s == pytest.approx(0.5, abs=0.3)
    assert one.text.startswith("a")
    assert the(ask("openai", answer, token_s=0.01, timeout_s=20)).status == "completed"


def test_behind_done_nothing_is_waited_for() -> None:
    """A connection that stays open adds nothing to the answer's time."""
    run = ask("openai", [*WORDS, DONE, b": bye\n", *[b": bye\n"] * 20], token_s=0.05)
    assert run.duration_s < 0.8
