"""Every field of every dialect changes the answer as it should, is refused by name, or is ignored for a reason."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tests.server.conftest import NAME, Running

from isologit import SamplingParams
from isologit.errors import RequestError
from isologit.server import fields, llm_serving, tgi
from isologit.server.fields import WARNING_HEADER, Ignored, Refused
from isologit.server.openai_fields import ChatRequest, CompletionRequest

PROMPT = "Describe the fox.\n"
HELLO = [{"role": "user", "content": "Describe the fox."}]
COMPLETION = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
CHAT = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0}

Answer = dict[str, Any]


def ask(http: httpx.Client, path: str, body: dict[str, Any]) -> Answer:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def text(answer: Answer) -> str:
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def ids(answer: Answer) -> list[int]:
    return list(answer["choices"][0]["token_ids"])


# -- what is done: the field, and whether two answers, without and with it, differ as they should ---------------------

With = Callable[[Answer, Answer], bool]
DIFFERENT: With = lambda plain, found: text(plain) != text(found)  # noqa: E731
SHORTER: With = lambda plain, found: (  # noqa: E731
    found["usage"]["completion_tokens"] < plain["usage"]["completion_tokens"]
)
SHORTER_PROMPT: With = lambda plain, found: (  # noqa: E731
    found["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"]
)

DONE: list[tuple[dict[str, Any], dict[str, Any], With]] = [
    ({}, {"model": "llama2"}, lambda plain, found: found["model"] == "llama2"),
    ({}, {"temperature": 2.0, "seed": 3}, DIFFERENT),
    ({"temperature": 2.0, "seed": 3}, {"seed": 4}, DIFFERENT),
    ({"temperature": 2.0, "seed": 3}, {"top_p": 1e-6}, DIFFERENT),
    ({"temperature": 2.0, "seed": 3}, {"top_k": 1}, DIFFERENT),
    ({"temperature": 2.0, "seed": 3}, {"min_p": 1.0}, DIFFERENT),
    ({}, {"n": 2}, lambda plain, found: len(found["choices"]) == 2),
    ({}, {"stop": "fox"}, SHORTER),
    ({}, {"max_tokens": 3}, SHORTER),
    ({"max_tokens": 60}, {"stop_token_ids": list(range(1024))}, SHORTER),
    ({"stop_token_ids": list(range(1024))}, {"min_tokens": 5}, lambda plain, found: SHORTER(found, plain)),
    ({"max_tokens": 400}, {"ignore_eos": True}, lambda plain, found: SHORTER(found, plain)),
    ({}, {"repetition_penalty": 5.0}, DIFFERENT),
    ({"temperature": 2.0, "seed": 3, "max_tokens": 100, "ignore_eos": True}, {"presence_penalty": 2.0}, DIFFERENT),
    ({"max_tokens": 60}, {"frequency_penalty": 2.0}, DIFFERENT),
    ({}, {"logit_bias": {"300": 100}}, lambda plain, found: ids(found) == [300] * 12),
    ({}, {"allowed_token_ids": [300, 301]}, lambda plain, found: set(ids(found)) <= {300, 301}),
    ({}, {"bad_words": ["fox"]}, lambda plain, found: "fox" in text(plain) and "fox" not in text(found)),
    ({"stop": "fox"}, {"include_stop_str_in_output": True}, lambda plain, found: text(found) == text(plain) + "fox"),
    ({}, {"truncate_prompt_tokens": 3}, lambda plain, found: found["usage"]["prompt_tokens"] == 3),
    ({"logprobs": 1}, {"return_tokens_as_token_ids": True}, lambda plain, found: "token_id:" in str(found)),
    ({}, {"prompt_logprobs": 2}, lambda plain, found: "decoded_token" in str(found)),
]  # fmt: skip
DONE_BY_COMPLETIONS: list[tuple[dict[str, Any], dict[str, Any], With]] = [
    ({}, {"prompt": "List 4 tools.\n"}, DIFFERENT),
    ({}, {"add_special_tokens": False}, SHORTER_PROMPT),
    ({}, {"echo": True}, lambda plain, found: text(found) == PROMPT + text(plain)),
    ({}, {"logprobs": 2}, lambda plain, found: len(found["choices"][0]["logprobs"]["tokens"]) == 12),
    ({}, {"best_of": 1}, lambda plain, found: text(found) == text(plain)),
]
DONE_BY_CHAT: list[tuple[dict[str, Any], dict[str, Any], With]] = [
    ({}, {"messages": [{"role": "user", "content": "List 4 tools."}]}, DIFFERENT),
    ({}, {"max_completion_tokens": 2}, SHORTER),
    ({}, {"logprobs": True}, lambda plain, found: len(found["choices"][0]["logprobs"]["content"]) == 12),
    ({"logprobs": True}, {"top_logprobs": 2}, lambda plain, found: "'top_logprobs': [{" in str(found)),
    ({}, {"add_special_tokens": True}, lambda plain, found: SHORTER_PROMPT(found, plain)),
]
ELSEWHERE = {  # fields with a test of their own
    "stream", "stream_options", "return_token_ids", "add_generation_prompt", "continue_final_message", "documents",
    "chat_template_kwargs",
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "base", "before", "more", "holds"),
    [
        *(("/v1/completions", COMPLETION, *case) for case in (*DONE, *DONE_BY_COMPLETIONS)),
        *(
            ("/v1/chat/completions", CHAT, {k: True if k == "logprobs" else v for k, v in before.items()}, more, holds)
            for before, more, holds in (*DONE, *DONE_BY_CHAT)
        ),
    ],
    ids=lambda value: "" if callable(value) or value in (COMPLETION, CHAT) else str(value)[:40],
)  # fmt: skip
def test_a_field_that_is_done_changes_the_answer_as_it_should(
    http: httpx.Client, path: str, base: dict[str, Any], before: dict[str, Any], more: dict[str, Any], holds: With
) -> None:
    body = {**base, **before, "return_token_ids": True}
    assert holds(ask(http, path, body), ask(http, path, {**body, **more}))


def test_every_field_that_is_done_is_tried() -> None:
    """Inverse: a field without a case above would be noticed here."""
    for model, own in ((CompletionRequest, DONE_BY_COMPLETIONS), (ChatRequest, DONE_BY_CHAT)):
        tried = {name for case in (*DONE, *own) for name in case[1]}
        assert set(model.model_fields) - tried == ELSEWHERE & set(model.model_fields)


# -- what is refused, ignored, unknown --------------------------------------------------------------------------------

WANTED: dict[str, Any] = {  # values that ask for something
    "use_beam_search": True, "length_penalty": 2.0, "skip_special_tokens": False, "priority": 5,
    "response_format": {"type": "json_object"}, "typical_p": 0.5, "watermark": True, "frequency_penalty": 0.5,
    "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto", "functions": [{"name": "f"}],
    "function_call": "auto", "echo": True, "modalities": ["text", "audio"], "logits_processors": ["a.b"],
}  # fmt: skip
PLACES = [
    ("/v1/completions", fields.COMPLETIONS, COMPLETION, None),
    ("/v1/chat/completions", fields.CHAT, CHAT, None),
    ("/generate", fields.TGI, {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}, "parameters"),
    ("/models/llama2/generate", fields.CONTEST, {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}, "parameters"),
]


@pytest.mark.parametrize(
    ("path", "name", "rule", "body", "inner"),
    [(path, name, rule, body, inner) for path, table, body, inner in PLACES for name, rule in table.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_other_field_is_refused_by_name_or_has_a_reason(
    http: httpx.Client, path: str, name: str, rule: Refused | Ignored, body: dict[str, Any], inner: str | None
) -> None:
    def send(value: Any) -> httpx.Response:
        more = {**body[inner], name: value} if inner else value
        return http.post(path, json={**body, inner: more} if inner else {**body, name: value})

    answer = send(WANTED.get(name, "something"))
    if isinstance(rule, Ignored):
        assert answer.status_code == 200
        assert rule.why
        assert WARNING_HEADER not in answer.headers
        return
    assert answer.status_code == (422 if path == "/generate" else 400)
    error = answer.json()["error"]
    assert name in (error["message"] if isinstance(error, dict) else error)
    assert not isinstance(error, dict) or error["param"] == name
    for neutral in (None, *rule.neutral):
        found = send(neutral)
        assert found.status_code == 200
        assert WARNING_HEADER not in found.headers


@pytest.mark.parametrize(
    ("path", "table", "body", "inner"), PLACES, ids=lambda value: value if "/" in str(value) else ""
)
def test_a_field_that_nobody_knows_is_told_in_a_header_and_once_in_the_log(
    http: httpx.Client, path: str, table: Any, body: dict[str, Any], inner: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    unknown = f"temprature_{len(path)}"
    wrong = {**body, inner: {**body[inner], unknown: 1}} if inner else {**body, unknown: 1, "\n é": 1}
    with caplog.at_level(logging.WARNING, "isologit.server"):
        answers = [http.post(path, json=wrong) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {200}
    assert all(unknown in answer.headers[WARNING_HEADER] for answer in answers)
    assert caplog.text.count(unknown) == 1
    assert "é" not in caplog.text
    assert WARNING_HEADER not in http.post(path, json=body).headers


def test_no_field_is_in_a_table_and_done() -> None:
    for model, table in (
        (CompletionRequest, fields.COMPLETIONS),
        (ChatRequest, fields.CHAT),
        (tgi.Parameters, fields.TGI),
        (llm_serving.Parameters, fields.CONTEST),
    ):
        assert not set(model.model_fields) & set(table)


@pytest.mark.parametrize(
    ("path", "wrong", "name"),
    [
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("completions", {"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"allowed_token_ids": []}, "allowed_token_ids"),
        ("completions", {"allowed_token_ids": [99999]}, "allowed_token_ids"),
        ("completions", {"logit_bias": {"99999": 1}}, "logit_bias"),
        ("completions", {"logit_bias": {"fox": 1}}, "logit_bias"),
        ("completions", {"logit_bias": {"5": "a"}}, "logit_bias"),
        ("completions", {"bad_words": ["a"] * 129}, "bad_words"),
        ("completions", {"stop": ["a"] * 129}, "stop"),
        ("completions", {"stop": "a" * 20_000}, "stop"),
        ("completions", {"bad_words": ["a" * 20_000]}, "bad_words"),
        ("completions", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("completions", {"min_p": 2}, "min_p"),
        ("completions", {"presence_penalty": -3}, "presence_penalty"),
        ("completions", {"prompt_logprobs": 21}, "prompt_logprobs"),
        ("completions", {"best_of": 3}, "best_of"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_name(
    http: httpx.Client, path: str, wrong: dict[str, Any], name: str
) -> None:
    body = CHAT if path.startswith("chat") else COMPLETION
    answer = http.post(f"/v1/{path}", json={**body, **wrong})
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == name


def test_bad_words_that_are_not_unicode_are_the_clients_mistake_and_hurt_nobody(
    http: httpx.Client, server: Running
) -> None:
    content = json.dumps({**COMPLETION, "bad_words": ["\ud800"]})
    answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "surrogate" in answer.json()["error"]["message"]
    ask(http, "/v1/completions", COMPLETION)
    server.wait_idle()
    request = server.service.request([1, 5], SamplingParams(max_tokens=2))
    broken = replace(request, params=replace(request.params, bad_words=("\ud800",)))
    loop = server.llm.open_loop()
    with pytest.raises(RequestError):
        loop.add(broken)
    assert not loop.has_work()


# -- text that is scored ----------------------------------------------------------------------------------------------


def test_a_text_is_scored_as_evaluation_harnesses_do(http: httpx.Client, server: Running) -> None:
    """With no token of an answer, and with one: the scores are those that generating gives."""
    generated = ask(
        http, "/v1/completions", {**COMPLETION, "logprobs": 3, "return_token_ids": True, "ignore_eos": True}
    )
    output, wanted = ids(generated), generated["choices"][0]["logprobs"]
    prompt = generated["choices"][0]["prompt_token_ids"]
    for count in (0, 1):
        body = {"prompt": [*prompt, *output], "max_tokens": count, "echo": True, "logprobs": 3, "temperature": 0}
        [choice] = ask(http, "/v1/completions", body)["choices"]
        shown = choice["logprobs"]
        assert len(shown["tokens"]) == len(prompt) + len(output) + count
        assert shown["token_logprobs"][0] is shown["top_logprobs"][0] is None
        scored = shown["token_logprobs"][len(prompt) : len(prompt) + len(output)]
        assert scored == pytest.approx(wanted["token_logprobs"], abs=1e-5)
        best = shown["top_logprobs"][len(prompt) : len(prompt) + len(output)]
        assert all(max(top.values()) == value for top, value in zip(best, scored, strict=True))  # greedy
        assert shown["text_offset"][0] == 0
        assert shown["text_offset"] == sorted(shown["text_offset"])
        assert choice["finish_reason"] == "length"
        assert choice["text"].startswith(server.service.tokenizer.decode(prompt))
    several = {"prompt": [prompt, [*prompt, *output]], "max_tokens": 0, "echo": True, "logprobs": 1, "n": 2}
    assert [len(c["logprobs"]["tokens"]) for c in ask(http, "/v1/completions", several)["choices"]] == [
        len(prompt), len(prompt), len(prompt) + len(output), len(prompt) + len(output),
    ]  # fmt: skip


def test_log_probabilities_of_a_prompt(http: httpx.Client) -> None:
    body = {**COMPLETION, "prompt_logprobs": 2, "max_tokens": 0, "return_token_ids": True}
    [choice] = ask(http, "/v1/completions", body)["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == len(choice["prompt_token_ids"]) - 1
    for token_id, shown in zip(choice["prompt_token_ids"][1:], others, strict=True):
        assert 2 <= len(shown) <= 3
        assert shown[str(token_id)]["logprob"] <= 0
        assert [entry["rank"] for entry in shown.values()][:2] == [1, 2]
    chat = ask(http, "/v1/chat/completions", {**CHAT, "prompt_logprobs": 0, "return_token_ids": True})
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"])


def test_an_echoed_prompt_and_its_answer_are_one_text(http: httpx.Client, server: Running) -> None:
    """A token keeps the space that parts it from the prompt; an answer alone does not begin with it."""
    prompt = "The quick brown"
    asked = {**COMPLETION, "prompt": prompt, "max_tokens": 4}
    [alone] = ask(http, "/v1/completions", {**asked, "return_token_ids": True})["choices"]
    tokenizer, output = server.service.tokenizer, alone["token_ids"]
    assert tokenizer.inner_text(output) == " " + alone["text"]  # else this test shows nothing
    [echoed] = ask(http, "/v1/completions", {**asked, "echo": True, "logprobs": 0})["choices"]
    assert echoed["text"] == f"{prompt} {alone['text']}"
    shown = echoed["logprobs"]
    spans = itertools.pairwise([*shown["text_offset"], len(echoed["text"])])
    assert [echoed["text"][begin:end] for begin, end in spans][2:] == shown["tokens"][2:]
    full = http.post(
        "/generate", json={"inputs": prompt, "parameters": {"max_new_tokens": 4, "return_full_text": True}}
    )
    assert full.json()["generated_text"] == echoed["text"]
    [first] = ask(http, "/v1/completions", {**asked, "echo": True, "prompt": [1]})["choices"]
    assert not first["text"].startswith(" ")  # no text stands before it


def test_an_echo_is_streamed_before_the_answer(http: httpx.Client) -> None:
    whole = ask(http, "/v1/completions", {**COMPLETION, "echo": True, "n": 2})
    answer = http.post("/v1/completions", json={**COMPLETION, "echo": True, "n": 2, "stream": True})
    texts = ["", ""]
    for line in answer.text.split("\n\n")[:-2]:
        [choice] = json.loads(line.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_token_ids_and_usage_come_with_every_event_when_asked_for(http: httpx.Client) -> None:
    for path, base in (("completions", COMPLETION), ("chat/completions", CHAT)):
        whole = ask(http, f"/v1/{path}", {**base, "return_token_ids": True})
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {**base, "return_token_ids": True, "stream": True, "stream_options": options}
        lines = http.post(f"/v1/{path}", json=body).text.split("\n\n")[:-2]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        choices = [choice for event in events for choice in event["choices"]]
        assert [i for choice in choices for i in choice["token_ids"]] == ids(whole)
        prompts = [found["prompt_token_ids"] for found in (*events, *choices) if "prompt_token_ids" in found]
        assert prompts == [whole.get("prompt_token_ids") or whole["choices"][0]["prompt_token_ids"]]
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert counts[-1] == whole["usage"]["completion_tokens"]


# -- TGI --------------------------------------------------------------------------------------------------------------


def test_a_seed_that_is_drawn_is_told_and_repeats_the_answer(http: httpx.Client) -> None:
    def generate(**parameters: Any) -> Answer:
        more = {"max_new_tokens": 20, "details": True, "temperature": 1.5, **parameters}
        return ask(http, "/generate", {"inputs": PROMPT, "parameters": more})

    first, second = generate(), generate()
    seed = first["details"]["seed"]
    assert isinstance(seed, int)
    assert second["details"]["seed"] != seed
    assert generate(seed=seed)["generated_text"] == first["generated_text"]
    assert generate(temperature=1.0)["details"]["seed"] is None  # greedy


def test_the_prompts_tokens_are_told_when_asked_for(http: httpx.Client) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2, "details": True, "decoder_input_details": True}}
    prefill = ask(http, "/generate", body)["details"]["prefill"]
    assert [token["id"] for token in prefill] == http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert prefill[0]["logprob"] is None
    assert all(token["logprob"] <= 0 for token in prefill[1:])
    assert http.post("/generate_stream", json=body).status_code == 422


def test_an_answer_without_log_probabilities_asks_for_none(server: Running, http: httpx.Client) -> None:
    """They cost every request of a step all of its logits."""
    engine = server.service.engine
    submit, asked = engine.submit, []

    def watching(requests: Any, *more: Any, **others: Any) -> Any:
        asked.extend(request.params.logprobs for request in requests)
        return submit(requests, *more, **others)

    engine.submit = watching  # type: ignore[method-assign]
    try:
        for details in (False, True):
            ask(http, "/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 2, "details": details}})
        ask(http, "/v1/completions", COMPLETION)
    finally:
        del engine.submit  # type: ignore[method-assign]
    assert asked == [None, 0, None]
