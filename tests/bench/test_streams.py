"""A stream gives the same messages however its bytes are cut, in every dialect, and never raises."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isologit.bench.dialects import DIALECTS
from isologit.bench.streams import Message, MessageStream

TEXT = st.text(max_size=12)
BACKENDS = sorted(DIALECTS)


def _read(backend: str, chunks: list[bytes]) -> list[Message]:
    stream = MessageStream(DIALECTS[backend].read)
    return [message for chunk in chunks for message in stream.feed(chunk)] + stream.finish()


def _wire(backend: str, texts: list[str], line_end: str, prefix: str) -> bytes:
    """An answer of these pieces as a server of the dialect sends it; text is not escaped, so it holds raw UTF-8."""
    whole = "".join(texts)
    if backend == "llm-serving":
        inner = [{"generated_text": text, "tokens": {"id": 1}} for text in texts]
        inner.append({"generated_text": whole, "finish_reason": "eos", "generated_tokens": len(texts)})
        values = [{"event": "message", "retry": 30000, "data": [one]} for one in inner]
    elif backend == "tgi":
        values = [{"token": {"text": text, "special": False}, "generated_text": None} for text in texts]
        details = {"finish_reason": "eos_token", "generated_tokens": len(texts)}
        values.append({"token": {"text": "</s>", "special": True}, "generated_text": whole, "details": details})
    else:
        key = (lambda text: {"text": text}) if backend == "openai" else (lambda text: {"delta": {"content": text}})
        values = [{"choices": [{**key(text), "finish_reason": None}]} for text in texts]
        values.append({"choices": [{**key(""), "finish_reason": "stop"}]})
        values.append({"choices": [], "usage": {"completion_tokens": len(texts)}})
    lines = [prefix + json.dumps(value, ensure_ascii=False) for value in values]
    if backend.startswith("openai"):
        lines.append("data: [DONE]")
    return (line_end.join(lines) + line_end).encode("utf-8", "surrogatepass")


def _cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=6),
    places=st.lists(st.integers(0, 10_000), max_size=12),
    line_end=st.sampled_from(["\n", "\r\n", "\n\n", "\r\n\r\n", "\n: comment\n\n", "\nevent: x\nid: 7\n"]),
    bare=st.booleans(),
)
def test_an_answer_survives_any_cutting(
    backend: str, texts: list[str], places: list[int], line_end: str, bare: bool
) -> None:
    prefix = "" if bare and backend == "llm-serving" else "data: "
    data = _wire(backend, texts, line_end, prefix)
    messages = _read(backend, _cut(data, places))
    assert messages == _read(backend, [data])
    assert "".join(message.text for message in messages) == "".join(texts)
    assert [message.error for message in messages if message.error] == []
    assert any(message.final for message in messages)
    assert [message.num_tokens for message in messages if message.num_tokens is not None] == [len(texts)]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=200), places=st.lists(st.integers(0, 300), max_size=8))
def test_any_bytes_give_the_same_messages_and_no_exception(backend: str, data: bytes, places: list[int]) -> None:
    assert _read(backend, _cut(data, places)) == _read(backend, [data])


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "data generated_text finish_reason generated_tokens choices text delta content usage completion_tokens "
                "token details special error".split()
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50, deadline=None)
@given(value=_JSON)
def test_any_json_is_a_message(backend: str, value: object) -> None:
    line = json.dumps(value).encode()
    (message,) = _read(backend, [b"data: " + line + b"\n"])
    assert isinstance(message.text, str)
    assert isinstance(message.full_text, str | None)
    assert isinstance(message.finish_reason, str | None)
    assert isinstance(message.error, str | None)
    assert message.num_tokens is None or (type(message.num_tokens) is int and message.num_tokens >= 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"data":' * 100_000, b"9" * 5000, b"\xff\xfe{}", b"NaN", b'"\\ud800"']
)
def test_what_breaks_json_readers_is_an_error_between_good_lines(backend: str, line: bytes) -> None:
    good = _wire(backend, ["one", " two"], "\n", "data: ")
    first, rest = good.split(b"\n", 1)
    messages = _read(backend, [first + b"\n" + line + b"\n" + rest])
    assert [message for message in messages if message.error is None] == _read(backend, [good])
    (error,) = [message.error for message in messages if message.error is not None]
    assert "not of this protocol" in error


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_comment_is_no_message_and_garbage_is_an_error(backend: str) -> None:
    assert _read(backend, [b": ping\n\nevent: message\nretry: 3\n\n"]) == []
    (message,) = _read(backend, [b"<html>gateway</html>\n"])
    assert message.error is not None
    assert "<html>" in message.error


@pytest.mark.parametrize("reason", ["prompt_out_of_range", "prompt_token_ids_empty", "predict_failed", "abort"])
def test_errors_in_band_are_errors(reason: str) -> None:
    value = {"data": [{"generated_text": "Error", "finish_reason": reason, "generated_tokens": 0}]}
    (message,) = _read("llm-serving", [json.dumps(value).encode()])
    assert message.error is not None
    assert reason in message.error


def test_answer_of_llm_serving_in_one_object_is_read_as_well() -> None:
    value = {"generated_text": "all of it", "finish_reason": "length", "generated_tokens": 3, "tokens": []}
    (message,) = _read("llm-serving", [json.dumps(value).encode()])
    assert message.final
    assert message.full_text == "all of it"
