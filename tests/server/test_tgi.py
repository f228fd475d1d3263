"""TGI's API, read as Hugging Face's own client and as the old `text_generation` client read it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, ValidationError
from tests.server.conftest import NAME, Running

PROMPT = "Describe the fox.\n"


@pytest.fixture
def client(server: Running) -> InferenceClient:
    return InferenceClient(base_url=server.url, provider="hf-inference", token="none", timeout=60)


def body(prompt: str = PROMPT, **parameters: Any) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": 12, **parameters}}


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """As the `text_generation` client does: bytes of a line after `data:` are JSON."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.content.split(b"\n") if line]
    assert all(line.startswith(b"data:") for line in lines)
    return [json.loads(line.removeprefix(b"data:")) for line in lines]


def completion(http: httpx.Client, prompt: str, count: int) -> str:
    """The same answer by way of another dialect."""
    asked = {"model": NAME, "prompt": prompt, "max_tokens": count, "temperature": 0}
    return str(http.post("/v1/completions", json=asked).json()["choices"][0]["text"])


def test_hugging_faces_client_whole_and_streamed(client: InferenceClient, http: httpx.Client) -> None:
    wanted = completion(http, PROMPT, 12)
    assert client.text_generation(PROMPT, max_new_tokens=12) == wanted
    assert "".join(client.text_generation(PROMPT, max_new_tokens=12, stream=True)) == wanted
    whole = client.text_generation(PROMPT, max_new_tokens=12, details=True)
    assert whole.generated_text == wanted
    assert whole.details is not None
    assert whole.details.finish_reason == "length"
    assert whole.details.generated_tokens == len(whole.details.tokens) == 12
    assert "".join(token.text for token in whole.details.tokens) == wanted
    assert all(token.logprob < 0 and not token.special for token in whole.details.tokens)
    parts = list(client.text_generation(PROMPT, max_new_tokens=12, details=True, stream=True))
    assert [part.token for part in parts] == [
        type(parts[0].token)(token.id, token.logprob, token.special, token.text) for token in whole.details.tokens
    ]
    assert [part.index for part in parts] == list(range(1, 13))
    assert [part.generated_text for part in parts] == [None] * 11 + [wanted]
    assert parts[-1].details is not None
    last = parts[-1].details
    assert (last.finish_reason, last.generated_tokens, last.input_length) == ("length", 12, 8)


def test_hugging_faces_client_other_endpoints(client: InferenceClient, server: Running) -> None:
    assert client.health_check()
    info = client.get_endpoint_info()
    assert info["model_id"] == NAME
    assert info["max_total_tokens"] == 1024
    assert info["max_input_tokens"] == 1023


def test_reasons_for_an_end(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=200, details=True)
    assert whole.details is not None
    assert whole.details.finish_reason == "eos_token"
    assert (whole.details.tokens[-1].special, whole.details.tokens[-1].text) == (True, "")
    stop = whole.generated_text[10:14]
    wanted = whole.generated_text[: whole.generated_text.index(stop) + len(stop)]
    cut = client.text_generation(PROMPT, max_new_tokens=200, details=True, stop=[stop])
    assert cut.details is not None
    assert cut.generated_text.startswith(wanted), "the stop sequence stays, and what its last token says"
    assert cut.generated_text == "".join(token.text for token in cut.details.tokens)
    assert cut.details.finish_reason == "stop_sequence"
    parts = list(client.text_generation(PROMPT, max_new_tokens=200, details=True, stream=True, stop=[stop]))
    assert parts[-1].generated_text == "".join(part.token.text for part in parts) == cut.generated_text


def test_seeds_repeat(client: InferenceClient) -> None:
    drawn = [client.text_generation(PROMPT, max_new_tokens=20, temperature=1.5, seed=seed) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = client.text_generation(PROMPT, max_new_tokens=20)
    assert client.text_generation(PROMPT, max_new_tokens=20, temperature=1.0) == greedy  # 1 asks for nothing
    assert client.text_generation(PROMPT, max_new_tokens=20, do_sample=True, top_k=1) == greedy


def test_details_are_told_when_asked_for(http: httpx.Client) -> None:
    plain = http.post("/generate", json=body()).json()
    assert set(plain) == {"generated_text"}
    assert events(http.post("/generate_stream", json=body()))[-1]["details"] is None
    found = http.post("/generate", json=body(details=True, top_n_tokens=3)).json()
    details = found["details"]
    assert details["prefill"] == []
    for token, best in zip(details["tokens"], details["top_tokens"], strict=True):
        assert best[0]["id"] == token["id"]  # greedy
        assert [one["logprob"] for one in best] == sorted((one["logprob"] for one in best), reverse=True)
        assert len(best) == 3
    streamed = events(http.post("/generate_stream", json=body(details=True, top_n_tokens=3)))
    assert [event["top_tokens"] for event in streamed] == details["top_tokens"]
    assert http.post("/generate", json={"inputs": PROMPT}).json()["generated_text"]  # no parameters at all


def test_full_text_and_truncation(http: httpx.Client) -> None:
    text = completion(http, PROMPT, 12)
    prompt = "\u2028 Describe the fox.\n"
    echoed = http.post("/generate", json=body(prompt, return_full_text=True)).json()["generated_text"]
    assert echoed.startswith(prompt)
    answer = http.post("/generate_stream", json=body(prompt, return_full_text=True))
    assert answer.content.isascii()  # clients that split at U+2028 see whole lines
    assert events(answer)[-1]["generated_text"] == echoed
    cut = http.post("/generate", json=body("List 4 tools.\n" + PROMPT, truncate=3)).json()["generated_text"]
    assert cut != text
    assert http.post("/generate", json=body(truncate=500)).json()["generated_text"] == text


def test_root_is_either_by_the_flag(http: httpx.Client) -> None:
    text = completion(http, PROMPT, 12)
    assert http.post("/", json=body()).json() == [{"generated_text": text}]
    assert events(http.post("/", json={**body(), "stream": True}))[-1]["generated_text"] == text


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 5000},
        {"temperature": 0},
        {"top_p": 2},
        {"stop": ["x"] * 17},
        {"truncate": 0},
        {"best_of": 2},
        {"frequency_penalty": 0.5},
        {"typical_p": 0.5},
        {"watermark": True},
        {"grammar": {"type": "regex", "value": "a"}},
        {"adapter_id": "a"},
    ],
)
def test_wrong_parameters_are_validation_errors(
    client: InferenceClient, http: httpx.Client, wrong: dict[str, Any]
) -> None:
    for path in ("/generate", "/generate_stream"):
        answer = http.post(path, json=body(**wrong))
        assert answer.status_code == 422
        assert answer.json()["error_type"] == "validation"
        assert next(iter(wrong)) in answer.json()["error"] or "limit of 1024" in answer.json()["error"]
    with pytest.raises(ValidationError):
        client.text_generation(PROMPT, details=True, **wrong)


def test_a_failed_step_is_a_generation_error(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = start()
    runner = broken.service.engine.engine.runner
    execute = runner.execute

    def fail_once(plan: Any) -> Any:
        monkeypatch.setattr(runner, "execute", execute)
        raise RuntimeError("no memory")

    client = InferenceClient(base_url=broken.url, token="none", timeout=60)
    monkeypatch.setattr(runner, "execute", fail_once)
    with pytest.raises(GenerationError):
        client.text_generation(PROMPT, max_new_tokens=12)
    monkeypatch.setattr(runner, "execute", fail_once)
    with pytest.raises(GenerationError):
        list(client.text_generation(PROMPT, max_new_tokens=12, stream=True))
    assert client.text_generation(PROMPT, max_new_tokens=12)
