"""Anything at all is sent, cut and sampled: nothing is the server's fault, and no text is lost or made up."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.conftest import NAME, Running, running
from tests.server.tools import PROMPT, SPOKEN, Spoken

from isologit.bench.streams import MessageStream
from isologit.server.app import create_app
from isologit.server.options import ServerOptions
from isologit.server.service import Service

EXAMPLES = int(os.environ.get("ISOLOGIT_FUZZ_EXAMPLES", "25"))  # of every operation
RELAXED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 25,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class _Errors(logging.Handler):
    """What the server complained about."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[Running, _Errors]]:
    """A server whose answers are short, and what it logs."""
    errors = _Errors()
    loggers = [logging.getLogger(name) for name in ("isologit", "uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(errors)
    with running(ServerOptions(max_model_len=40, max_queue=64)) as server:
        yield server, errors
    for logger in loggers:
        logger.removeHandler(errors)


schema = schemathesis.openapi.from_dict(
    create_app(cast(Service, SimpleNamespace(allowed_origins=(), commitments=None))).openapi()
)  # all dialects; nothing is served


@schema.parametrize()
@RELAXED
def test_whatever_is_sent_the_server_is_not_at_fault(case: schemathesis.Case, fuzzed: tuple[Running, _Errors]) -> None:
    server, errors = fuzzed
    answer = case.call(base_url=server.url, timeout=30)
    assert answer.status_code < 500
    assert answer.status_code != 424  # TGI's status for a failed step
    assert b"error304" not in answer.content  # the contest's text for one
    assert not errors.messages
    assert server.service.engine.failed is None


LONE = st.characters(categories=["Cs"])
TEXT = st.text(st.one_of(st.characters(), LONE), max_size=20)
NUMBER = st.one_of(st.integers(-(10**30), 10**30), st.floats(), st.sampled_from([1e-320, 1e308, -0.0, 0.5]))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
NAMES = [
    "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop", "n", "max_tokens", "max_new_tokens",
    "min_tokens", "logprobs", "top_logprobs", "stop_token_ids", "ignore_eos", "logit_bias", "stream_options", "echo",
    "do_sample", "return_full_text", "return_protocol", "details", "truncate", "top_n_tokens", "messages", "prompt",
    "inputs", "model", "stream", "suffix", "best_of", "tools", "response_format", "max_completion_tokens", "min_p",
    "presence_penalty", "frequency_penalty", "bad_words", "allowed_token_ids", "include_stop_str_in_output",
    "prompt_logprobs", "truncate_prompt_tokens", "add_special_tokens", "return_token_ids", "continue_final_message",
    "add_generation_prompt", "chat_template_kwargs", "documents", "return_tokens_as_token_ids",
    "decoder_input_details", "unknown",
]  # fmt: skip


@pytest.mark.parametrize("spoken", SPOKEN, ids=lambda spoken: spoken.name)
@RELAXED
@given(changes=st.dictionaries(st.sampled_from(NAMES), st.one_of(VALUE, NUMBER), min_size=1, max_size=4), stream=...)
def test_good_requests_with_anything_in_some_fields(
    fuzzed: tuple[Running, _Errors], spoken: Spoken, changes: dict[str, Any], stream: bool
) -> None:
    """Close to what is right, so that much of it is taken and reaches the engine."""
    server, errors = fuzzed
    path, body = spoken.request("List 4 tools.\n", 5, stream=stream)
    inner = "parameters" if "parameters" in body else None
    body = {**body, inner: {**body[inner], **changes}} if inner else {**body, **changes}
    content = json.dumps(body)
    answer = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"}, timeout=30)
    assert answer.status_code < 500
    assert answer.status_code != 424
    assert b"error304" not in answer.content
    assert b"step failed" not in answer.content
    assert not errors.messages


@pytest.fixture(scope="module")
def recorded(server: Running) -> dict[str, tuple[bytes, str]]:
    """A stream of every dialect as it came, and the text of the same answer as a whole."""
    found = {}
    for spoken in SPOKEN:
        path, body = spoken.request(tokens=60, stream=True)
        content = httpx.post(server.url + path, json=body, timeout=30).content
        path, body = spoken.request(tokens=60)
        found[spoken.name] = content, spoken.text(httpx.post(server.url + path, json=body, timeout=30).json())
    return found


@pytest.mark.parametrize("spoken", SPOKEN, ids=lambda spoken: spoken.name)
@RELAXED
@given(cuts=st.lists(st.integers(0, 100_000), max_size=40))
def test_streams_read_the_same_however_they_are_cut(
    recorded: dict[str, tuple[bytes, str]], spoken: Spoken, cuts: list[int]
) -> None:
    content, text = recorded[spoken.name]
    places = sorted({0, *(cut % len(content) for cut in cuts), len(content)})
    stream = MessageStream(spoken.dialect.read)
    messages = [m for a, b in pairwise(places) for m in stream.feed(content[a:b])] + stream.finish()
    assert messages == spoken.messages(content)
    assert "".join(message.text for message in messages) == text
    assert messages[-1].final


def test_the_prompt_of_these_tests_is_answered(fuzzed: tuple[Running, _Errors]) -> None:
    """Inverse: the fuzzed server does answer what is right, so the statuses above mean something."""
    for spoken in SPOKEN:
        path, body = spoken.request("List 4 tools.\n", 5)
        assert httpx.post(fuzzed[0].url + path, json=body, timeout=30).status_code == 200
    assert httpx.post(f"{fuzzed[0].url}/v1/completions", json={"model": NAME, "prompt": PROMPT}).status_code == 200
