"""OpenAI's own client as the user: completions and chat, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
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
        {"presence_penalty": 3.0},
        {"echo": True, "logprobs": 1, "stream": True},
        {"n": 1000},
    ],
)
def test_wrong_requests_are_refused_with_a_reason(client: openai.OpenAI, wrong: dict[str, object]) -> None:
    good = {"model": NAME, "prompt": PROMPT, "max_tokens": 4}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.completions.create(**{**good, **wrong})  # type: ignore[call-overload]
    assert caught.value.message


def test_the_wire_ends_with_done_and_tells_usage_only_when_asked(http: httpx.Client) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": True}
    answer = http.post("/v1/completions", json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    values = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(value["object"] == "text_completion" and "usage" not in value for value in values)
    assert len({value["id"] for value in values}) == 1
    answer = http.post("/v1/completions", json={**asked, "stream_options": {"include_usage": True}})
    values = [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n")[:-2]]
    assert [value["usage"] for value in values[:-1]] == [None] * (len(values) - 1)
    assert values[-1]["choices"] == []
    assert values[-1]["usage"] == {"prompt_tokens": 8, "completion_tokens": 5, "total_tokens": 13}


def test_usage_counts_a_prompt_once_and_every_choice(client: openai.OpenAI) -> None:
    found = client.completions.create(model=NAME, prompt=[PROMPT, PROMPT], max_tokens=5, temperature=0, n=2)
    assert found.usage is not None
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (16, 20)


def test_logprobs_are_as_many_as_asked_for(client: openai.OpenAI) -> None:
    def chat(**more: Any) -> Any:
        messages: Any = [{"role": "user", "content": "Describe the fox."}]
        return client.chat.completions.create(model=NAME, messages=messages, max_tokens=10, **more).choices[0].logprobs

    assert chat() is None
    for count in (0, 1, 4):
        found = chat(logprobs=True, top_logprobs=count, temperature=2.0, seed=3)
        assert len(found.content) == 10
        for entry in found.content:
            assert len(entry.top_logprobs) == count
            for shown in (entry, *entry.top_logprobs):
                assert shown.logprob <= 0
                text = bytes(shown.bytes).decode(errors="replace")
                assert text == shown.token or ("\ufffd" in text and shown.token.startswith("bytes:\\x"))
            values = [other.logprob for other in entry.top_logprobs]
            assert values == sorted(values, reverse=True)
    plain = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=10, temperature=0, logprobs=0).choices[0]
    assert plain.logprobs is not None
    assert len(plain.logprobs.token_logprobs or []) == 10
    offsets = plain.logprobs.text_offset or []
    assert offsets == sorted(offsets)
    stream = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=10, temperature=0, logprobs=0, stream=True)
    parts = [event.choices[0].logprobs for event in stream]
    assert [value for part in parts if part for value in part.text_offset or []] == offsets
    assert [value for part in parts if part for value in part.token_logprobs or []] == plain.logprobs.token_logprobs


def test_chat_with_choices_and_several_stops(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Describe "}, {"type": "text", "text": "the fox."}]}
    ]
    free = client.chat.completions.create(model=NAME, messages=messages, max_tokens=30, temperature=0)
    text = free.choices[0].message.content
    assert text is not None
    stops = [text[20:24], text[10:14]]
    cut = client.chat.completions.create(model=NAME, messages=messages, max_tokens=30, temperature=0, stop=stops, n=2)
    assert [choice.message.content for choice in cut.choices] == [text[: text.index(stops[1])]] * 2
    assert {choice.finish_reason for choice in cut.choices} == {"stop"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"content": "no role"}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"top_logprobs": 21, "logprobs": True},
        {"logit_bias": {"a": 10}},
        {"frequency_penalty": -2.5},
        {"max_tokens": 2000},
        {"seed": -1},
    ],
)
def test_wrong_chats_are_refused_with_a_reason(client: openai.OpenAI, wrong: dict[str, Any]) -> None:
    good = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**good, **wrong})
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.body["message"]


def test_a_failed_step_is_an_error_the_client_raises(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = start()
    runner = broken.service.engine.engine.runner
    execute = runner.execute

    def fail_once(plan: Any) -> Any:
        monkeypatch.setattr(runner, "execute", execute)
        raise RuntimeError("no memory")

    with openai.OpenAI(base_url=f"{broken.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        monkeypatch.setattr(runner, "execute", fail_once)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model=NAME, prompt=PROMPT)
        monkeypatch.setattr(runner, "execute", fail_once)
        with pytest.raises(openai.APIError, match="step failed"):
            list(client.completions.create(model=NAME, prompt=PROMPT, stream=True))
        assert client.completions.create(model=NAME, prompt=PROMPT).choices


def test_keys_and_names(start: Any) -> None:
    locked = start(api_key="secret")
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="secret", max_retries=0) as client:
        assert client.models.list().data[0].id == NAME
        locked.service.names = ["org/model"]
        assert client.models.retrieve("org/model").id == "org/model"


def test_the_asynchronous_client(server: Running) -> None:
    prompts = [PROMPT, "List 4 tools.\n", "Count from 3 to 30.\n"]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model=NAME, prompt=prompt, max_tokens=20, temperature=0, stream=True
                )
                return "".join([event.choices[0].text async for event in stream])

            return await asyncio.gather(*map(one, prompts))

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        alone = [
            client.completions.create(model=NAME, prompt=prompt, max_tokens=20, temperature=0).choices[0].text
            for prompt in prompts
        ]
    assert asyncio.run(ask()) == alone
