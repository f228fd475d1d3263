"""OpenAI's own client as the user: completions and chat, whole and streamed."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from tests.server.conftest import NAME, Running

PROMPT = "Describe the fox.\n"


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    assert client.models.list().data[0].id == NAME
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_completions_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    stream = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    assert "".join(event.choices[0].text for event in events if event.choices) == whole.choices[0].text
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert events[-1].usage == whole.usage


def test_chat_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Describe the fox."}]
    whole = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=12, temperature=0)  # type: ignore[call-overload]
    plain = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0)
    assert whole.choices[0].message.content == plain.choices[0].text
    stream = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=12, temperature=0, stream=True, logprobs=True, top_logprobs=2
    )  # type: ignore[call-overload]
    events = list(stream)
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events) == whole.choices[0].message.content
    entries = [entry for e in events if e.choices[0].logprobs for entry in e.choices[0].logprobs.content]
    assert len(entries) == 12
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_stop_strings_never_show(client: openai.OpenAI) -> None:
    free = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=30, temperature=0).choices[0].text
    stop = free[10:14]
    for stream in (False, True):
        answer = client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop], stream=stream
        )
        events = list(answer) if stream else [answer]  # type: ignore[arg-type]
        assert "".join(event.choices[0].text for event in events) == free[: free.index(stop)]
        assert events[-1].choices[0].finish_reason == "stop"


def test_seeds_repeat_and_choices_differ(client: openai.OpenAI) -> None:
    def ask(seed: int, n: int = 3) -> list[str]:
        found = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20, temperature=1.5, seed=seed, n=n)
        return [choice.text for choice in sorted(found.choices, key=lambda choice: choice.index)]

    first = ask(5)
    assert ask(5) == first
    assert len(set(first)) > 1
    assert ask(6) != first
    stream = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=20, temperature=1.5, seed=5, n=3, stream=True
    )
    texts = ["", "", ""]
    for event in stream:
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == first


def test_several_prompts_and_token_ids(client: openai.OpenAI, server: Running) -> None:
    ids = server.service.tokenizer.encode(PROMPT)
    texts = client.completions.create(model=NAME, prompt=[PROMPT, "List 4 tools.\n"], max_tokens=8, temperature=0)
    by_ids = client.completions.create(model=NAME, prompt=ids, max_tokens=8, temperature=0, logprobs=3)
    assert by_ids.choices[0].text == texts.choices[0].text
    assert len(texts.choices) == 2
    logprobs = by_ids.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []).strip() == by_ids.choices[0].text
    assert all(len(best) == 3 for best in logprobs.top_logprobs or [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "gpt-4"},
        {"max_tokens": 0},
        {"max_tokens": 5000},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [99999]},
        {"temperature": -1},
        {"presence_penalty": 1.0},
        {"echo": True},
        {"n": 1000},
    ],
)
def test_wrong_requests_are_refused_with_a_reason(client: openai.OpenAI, wrong: dict[str, object]) -> None:
    good = {"model": NAME, "prompt": PROMPT, "max_tokens": 4}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.completions.create(**{**good, **wrong})  # type: ignore[call-overload]
    assert caught.value.message
