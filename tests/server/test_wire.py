"""What this server really streams, read by the load generator's parsers however the network cuts it."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.conftest import NAME, Running

from isologit.bench.dialects import DIALECTS, LoadRequest
from isologit.bench.streams import Message, MessageStream

REQUEST = LoadRequest("0", "Describe the fox.\n", None, 8, 25)


@cache
def _wire(url: str, backend: str, accept: str) -> bytes:
    """The bytes of one answer."""
    dialect = DIALECTS[backend]
    path = dialect.endpoint.format(model=NAME)
    body = dialect.body(REQUEST, NAME, False)
    return httpx.post(url + path, json=body, headers={"accept": accept}, timeout=60).raise_for_status().content


def _read(backend: str, chunks: list[bytes]) -> list[Message]:
    stream = MessageStream(DIALECTS[backend].read)
    return [message for chunk in chunks for message in stream.feed(chunk)] + stream.finish()


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
@pytest.mark.parametrize("backend", sorted(DIALECTS))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.integers(0, 20_000), max_size=40))
def test_an_answer_is_the_same_however_it_is_cut(server: Running, backend: str, accept: str, places: list[int]) -> None:
    data = _wire(server.url, backend, accept)
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    messages = _read(backend, [data[start:end] for start, end in pairwise(edges)])
    assert messages == _read(backend, [data])
    assert [message.error for message in messages if message.error] == []
    assert messages[-1].final
    assert [message.num_tokens for message in messages if message.num_tokens is not None] == [25]
    text = "".join(message.text for message in messages)
    assert text == "".join(message.text for message in _read("openai", [_wire(server.url, "openai", "*/*")]))
    assert all(message.full_text == text for message in messages if message.full_text is not None)
