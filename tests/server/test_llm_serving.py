"""The contest's API: fields, defaults, clamps, error texts and streams; and its own client's way of reading them."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest
import requests
from tests.server.conftest import Running

from isologit import SamplingParams
from isologit.server.llm_serving import Parameters, sampling_params

PROMPTS = ["Describe the fox.\n", "List 4 tools.\n", "Count from 3 to 30.\n", "Describe the owl.\n"]


def body(prompt: str = PROMPTS[0], **parameters: Any) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"do_sample": "False", "max_new_tokens": 9, **parameters}, "stream": False}


def offline(server: Running, prompt: str, count: int) -> str:
    """What the engine gives without a server; nothing may be running."""
    llm = type(server.llm)(server.llm.checkpoint.source, num_threads=1)
    try:
        return llm.generate(prompt, SamplingParams(max_tokens=count))[0].text
    finally:
        llm.close()


def test_a_whole_answer_has_every_field(http: httpx.Client, server: Running) -> None:
    found = http.post("/models/llama2/generate", json=body(topk_k=7, seed=0)).json()
    assert found["generated_text"] == offline(server, PROMPTS[0], 9)
    assert found["finish_reason"] == "length"
    assert found["generated_tokens"] == len(found["tokens"]) == 9
    assert found["prefill"] == found["tokens"][:1] == found["top_tokens"][0]
    assert set(found["tokens"][0]) == {"id", "logprob", "special", "text"}
    assert found["tokens"][0]["logprob"] < 0
    assert found["details"] is None
    short = http.post("/models/llama2/generate", json=body(max_new_tokens=200)).json()
    assert short["finish_reason"] == "eos"


def test_a_stream_is_bare_json_lines_then_the_whole(http: httpx.Client) -> None:
    answer = http.post("/models/llama2/generate_stream", json=body())
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert len(lines) == 10
    assert all(line["event"] == "message" and line["retry"] == 30000 and len(line["data"]) == 1 for line in lines)
    pieces = [line["data"][0]["generated_text"] for line in lines]
    assert "".join(pieces[:-1]) == pieces[-1]
    assert lines[-1]["data"][0]["finish_reason"] == "length"
    short = http.post("/models/llama2/generate_stream", json=body(return_full_text="False")).text.splitlines()
    assert len(short) == 9


def test_other_forms_of_the_stream(http: httpx.Client) -> None:
    events = http.post("/models/llama2/generate_stream", json=body(), headers={"accept": "text/event-stream"}).text
    assert all(line.startswith("data: {") for line in events.strip().split("\n\n"))
    bare = http.post("/models/llama2/generate_stream", json=body(return_protocol="text")).text.splitlines()
    assert all(line.startswith("data:{") for line in bare)
    assert json.loads(bare[-1][5:])["finish_reason"] == "length"
    by_flag = http.post("/models/llama2", json={**body(), "stream": "True"}).text.splitlines()
    assert len(by_flag) == 10
    assert http.post("/models/llama2", json=body()).json()["generated_tokens"] == 9


def test_errors_are_told_in_band(http: httpx.Client) -> None:
    for path in ("generate", "generate_stream"):
        for wrong, text, reason in (
            (body("", max_new_tokens=5), "Error203: prompt token empty", "prompt_token_ids_empty"),
            (body(max_new_tokens=1020), "Error202: prompt out of range", "prompt_out_of_range"),
        ):
            answer = http.post(f"/models/llama2/{path}", json=wrong)
            assert answer.status_code == 200
            found = answer.json()
            found = found["data"][0] if path == "generate_stream" else found
            assert (found["generated_text"], found["finish_reason"]) == (text, reason)
            assert found["generated_tokens"] == 0
    assert http.post("/models/llama2/generate", json={"parameters": {}}).status_code == 422
    assert http.post("/models/llama2/generate", json=body(max_new_tokens="many")).status_code == 422
    assert http.post("/models/llama2/generate", json=body(max_new_tokens=0)).status_code == 422
    unknown = http.post("/models/gpt/generate", json=body())
    assert unknown.status_code == 400
    assert "llama2" in unknown.json()["detail"]


def test_information_endpoints(http: httpx.Client) -> None:
    def data(path: str) -> Any:
        text = http.get(path).text
        assert text.startswith("data: ")
        assert text.endswith("\n\n")
        return json.loads(text[6:])["data"]

    assert data("/serving/get_bs") == 128
    assert data("/serving/get_request_numbers") == 0
    info = data("/serving/get_serverd_model_info")
    assert info["model_id"] == "demo"
    assert info["model_pipeline_tag"] == "text-generation"


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ({}, {"max_tokens": 300, "temperature": 0.0, "top_k": 3, "top_p": 1.0}),
        ({"do_sample": "True"}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.0}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 70000}, {"temperature": 0.0}),
        ({"do_sample": "True", "temperature": "0.8"}, {"temperature": 0.8}),
        ({"top_k": 0}, {"top_k": 1}),
        ({"top_k": 1024}, {"top_k": 1}),
        ({"top_k": 900}, {"top_k": 100}),
        ({"top_p": 0.001}, {"top_p": 0.01}),
        ({"top_p": 1.7}, {"top_p": 1.0}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ],
)
def test_defaults_and_clamps(asked: dict[str, Any], want: dict[str, Any]) -> None:
    found = sampling_params(Parameters(**asked), 1024, strict=False)
    assert {name: getattr(found, name) for name in want} == want


def test_strict_contest_copies_visible_quirks_and_only_then() -> None:
    assert sampling_params(Parameters(), 1024, strict=True).temperature == 1.0
    assert sampling_params(Parameters(repetition_penalty=1.3), 1024, strict=True).repetition_penalty == 1.0


def test_strict_contest_loses_the_last_text_of_a_long_answer(start: Any) -> None:
    strict = start(strict_contest=True)
    whole = requests.post(f"{strict.url}/models/llama2/generate", json=body(), timeout=60).json()
    assert whole["tokens"][-1]["text"] == ""
    assert whole["generated_text"] == "".join(token["text"] for token in whole["tokens"])


class ArchivedClient:
    """Sends and reads as the contest's load generator does: a thread a request, `iter_lines`, bare JSON."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.results: dict[str, dict[str, Any]] = {}

    def send(self, prompt: str, count: int) -> None:
        data = {
            "inputs": prompt,
            "parameters": {
                "max_new_tokens": count, "do_sample": "False", "return_full_text": "True", "topk_k": 3,
                "temperature": 1.0, "stream": "True",
            },
            "stream": "True",
        }  # fmt: skip
        last = None
        with requests.post(f"{self.url}/models/llama2/generate_stream", json=data, stream=True, timeout=60) as answer:
            for line in answer.iter_lines():
                if line:
                    last = json.loads(line)["data"][0]["generated_text"]
        self.results[prompt] = {"input": prompt, "resp_text": last}


def test_the_contest_client_works_unchanged(server: Running) -> None:
    client = ArchivedClient(server.url)
    threads = [threading.Thread(target=client.send, args=(prompt, 20)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {p: r["resp_text"] for p, r in client.results.items()} == {p: offline(server, p, 20) for p in PROMPTS}
