"""Conversations and other models' tokens: endless templates, control tokens in users' text, byte-level tokens."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.server.conftest import NAME, Running, running
from tests.server.tools import PROMPT, process
from tests.text.tokenizer_files import train_byte_level

from isologit.config import EngineOptions
from isologit.errors import ModelError
from isologit.server.options import ServerOptions
from isologit.workload import demo_model_path

HELLO = [{"role": "user", "content": "Hello"}]
SLOW = """
{%- if messages[0]['content'] == 'slow' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif messages[0]['content'] == 'large' %}{{ 'a' * 4000000000 }}
{%- elif messages[0]['content'] == 'range' %}{% for i in range(10**9) %}{% endfor %}
{%- else %}{{ messages[0]['content'] }}{% endif %}"""
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def model_with(folder: Path, template: str) -> Path:
    """The demo model with another chat template."""
    shutil.copytree(demo_model_path(), folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with(tmp_path_factory.mktemp("slow") / "model", SLOW)


@pytest.fixture(scope="module")
def slow(slow_model: Path) -> Iterator[Running]:
    with running(ServerOptions(engine=EngineOptions(model=str(slow_model)))) as found:
        yield found


def chat(url: str, content: str, **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize(("content", "word"), [("slow", "time"), ("large", "memory"), ("range", "")])
def test_a_template_that_breaks_its_limits_is_one_clear_refusal(slow: Running, content: str, word: str) -> None:
    answer = chat(slow.url, content)
    assert answer.status_code == 400
    assert "chat template" in answer.json()["error"]["message"]
    assert word in answer.json()["error"]["message"]
    assert chat(slow.url, "Hello").status_code == 200


def test_others_are_answered_while_a_template_runs(slow: Running) -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(chat(slow.url, "slow").status_code))
    thread.start()
    answered = 0  # a server that waited for the template would have answered one at its end
    while thread.is_alive():
        body = {"prompt": "a", "max_tokens": 2}
        assert httpx.post(f"{slow.url}/v1/completions", json=body, timeout=60).status_code == 200
        answered += 1
    assert statuses == [400]
    assert answered > 1


def test_a_signal_is_heard_while_a_template_runs(slow_model: Path) -> None:
    with process("--model", str(slow_model)) as server:
        thread = threading.Thread(target=chat, args=(server.url, "slow"), daemon=True)
        assert chat(server.url, "Hello").status_code == 200
        thread.start()
        time.sleep(0.3)
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - start < 15


@pytest.mark.parametrize("template", [ENDLESS, "{{ 'a' * 4000000000 }}", "{% for %}"])
def test_a_template_that_never_works_is_refused_before_anything_is_served(tmp_path: Path, template: str) -> None:
    model = model_with(tmp_path / "model", template)
    with (
        pytest.raises(ModelError, match="chat template"),
        running(ServerOptions(engine=EngineOptions(model=str(model)))),
    ):
        pass


def test_a_template_of_the_clients_is_refused_by_name(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "chat_template": "{{ 1 }}"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template"


# -- what a user writes -----------------------------------------------------------------------------------------------

SPELLED = "hi</s>"


def test_control_tokens_in_a_users_text_are_made_unless_told_otherwise(
    server: Running, start: Callable[..., Running]
) -> None:
    """As in transformers and vLLM; with the option they are the characters that they are."""
    messages = [{"role": "user", "content": SPELLED}]
    plain = start(plain_user_content=True)
    eos = server.service.tokenizer.eos_token_id
    made = httpx.post(f"{server.url}/tokenize", json={"messages": messages}).json()["tokens"]
    kept = httpx.post(f"{plain.url}/tokenize", json={"messages": messages}).json()["tokens"]
    assert eos in made
    assert eos not in kept
    assert SPELLED in plain.service.tokenizer.decode(kept)
    usages = [chat(running.url, SPELLED).json()["usage"]["prompt_tokens"] for running in (server, plain)]
    assert usages == [len(made), len(kept)]
    harmless = [{"role": "user", "content": "Describe the fox."}]
    both = [httpx.post(f"{one.url}/tokenize", json={"messages": harmless}).json()["tokens"] for one in (server, plain)]
    assert both[0] == both[1]


def test_a_message_is_continued(http: httpx.Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The fox is"}]
    more = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True, "max_tokens": 3}
    found = http.post("/v1/chat/completions", json={"messages": messages, **more}).json()
    ids = found["prompt_token_ids"]
    asked = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert http.post("/tokenize", json=asked).json()["tokens"] == ids
    assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith("The fox is")
    both = http.post("/v1/chat/completions", json={"messages": messages, "continue_final_message": True})
    assert both.status_code == 400
    assert "add_generation_prompt" in both.json()["error"]["message"]


# -- byte-level tokenizers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    train_byte_level(file)
    with running(ServerOptions(engine=EngineOptions(tokenizer=file))) as found:
        yield found


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_with_tokens_that_stand_for_bytes(byte_level: Running, stream: bool) -> None:
    """Drawn hot, so that many tokens are parts of characters."""
    with openai.OpenAI(base_url=f"{byte_level.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer: Any = client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=60, temperature=2.0, seed=3, logprobs=5, stream=stream,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        choices = [event.choices[0] for event in answer] if stream else answer.choices
    tokenizer = byte_level.service.tokenizer
    ids = [i for choice in choices for i in choice.token_ids]
    names = [name for choice in choices if choice.logprobs for name in choice.logprobs.tokens]
    best = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.top_logprobs]
    offsets = [offset for choice in choices if choice.logprobs for offset in choice.logprobs.text_offset]
    assert len(names) == len(best) == len(ids) == len(offsets) == 60
    for token_id, name in zip(ids, names, strict=True):
        data = tokenizer.token_bytes(token_id)
        try:
            assert name == data.decode()
        except UnicodeDecodeError:
            assert name == "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    assert any(name.startswith("bytes:\\x") for name in names)
    text = "".join(choice.text for choice in choices)
    assert offsets == sorted(offsets)
    assert max(offsets) <= len(text)


def test_the_likelier_of_two_tokens_with_one_text_is_shown(byte_level: Running) -> None:
    """Ids beyond the tokenizer's vocabulary all have no text."""
    body = {"prompt": PROMPT, "max_tokens": 8, "logprobs": 20, "temperature": 0}
    found = httpx.post(f"{byte_level.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["logprobs"]
    by_id = {**body, "return_tokens_as_token_ids": True}
    exact = httpx.post(f"{byte_level.url}/v1/completions", json=by_id, timeout=60).json()["choices"][0]["logprobs"]
    tokenizer = byte_level.service.tokenizer
    shared = 0
    for named, numbered in zip(found["top_logprobs"], exact["top_logprobs"], strict=True):
        assert len(numbered) == 20
        likeliest: dict[str, float] = {}
        for name, value in numbered.items():
            data = tokenizer.token_bytes(int(name.removeprefix("token_id:")))
            text = data.decode(errors="replace")
            if "\ufffd" not in text:
                shared += text in likeliest
                likeliest[text] = max(value, likeliest.get(text, value))
        assert likeliest == {text: named[text] for text in likeliest}
    assert shared


def test_chats_bytes_join_to_the_text(byte_level: Running, server: Running) -> None:
    body = {"messages": HELLO, "max_tokens": 40, "logprobs": True, "top_logprobs": 2, "temperature": 2.0, "seed": 1}
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
    data = b"".join(
        bytes(entry["bytes"]) for entry in found["logprobs"]["content"] if entry["token"] not in ("<s>", "</s>")
    )
    assert data.decode(errors="replace").strip() == found["message"]["content"].strip()
