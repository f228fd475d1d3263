"""The contest's API: fields, defaults, clamps, error texts and streams; and its own client's way of reading them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import requests
from tests.server.conftest import Running

from isologit import SamplingParams
from isologit.engine.request import RequestMetrics, RequestOutput
from isologit.errors import RequestError
from isologit.server.llm_serving import Parameters, sampling_params
from isologit.server.service import Answer, Piece, Token

PROMPTS = ["Describe the fox.\n", "List 4 tools.\n", "Count from 3 to 30.\n", "Describe the owl.\n"]


def body(prompt: str = PROMPTS[0], **parameters: Any) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"do_sample": "False", "max_new_tokens": 9, **parameters}, "stream": False}


def offline(server: Running, prompt: str | list[int], count: int) -> str:
    """What the engine gives without a server."""
    llm = type(server.llm)(server.llm.checkpoint.source, num_threads=1)
    given = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    try:
        return llm.generate(given, SamplingParams(max_tokens=count))[0].text
    finally:
        llm.close()


def test_a_whole_answer_has_every_field(http: httpx.Client, server: Running) -> None:
    found = http.post("/models/llama2/generate", json=body(topk_k=7, seed=0)).json()
    assert set(found) == {
        "generated_text", "finish_reason", "generated_tokens", "prefill", "seed", "tokens", "top_tokens", "details"
    }  # fmt: skip
    assert found["generated_text"] == offline(server, PROMPTS[0], 9)
    assert found["finish_reason"] == "length"
    assert found["generated_tokens"] == len(found["tokens"]) == 9
    assert found["prefill"] == found["tokens"][:1] == found["top_tokens"][0]
    assert set(found["tokens"][0]) == {"id", "logprob", "special", "text"}
    assert all(token["logprob"] < 0 for token in found["tokens"])
    assert "".join(token["text"] for token in found["tokens"]) == found["generated_text"]
    assert found["seed"] == 0
    assert found["details"] is None
    short = http.post("/models/llama2/generate", json=body(max_new_tokens=200)).json()
    assert short["finish_reason"] == "eos"
    last = short["tokens"][-1]
    assert (last["id"], last["text"], last["special"]) == (2, "", True)


def test_defaults_are_those_of_a_body_with_a_prompt_alone(http: httpx.Client) -> None:
    alone = http.post("/models/internlm/generate", json={"inputs": PROMPTS[0]}).json()
    assert alone == http.post("/models/llama2/generate", json=body(max_new_tokens=300)).json()
    assert alone == http.post("/models/demo/generate", json={"inputs": PROMPTS[0], "parameters": None}).json()


def test_a_path_decides_about_streaming_before_the_flag(http: httpx.Client) -> None:
    flagged = {**body(), "stream": "True"}
    assert http.post("/models/llama2/generate", json=flagged).json()["generated_tokens"] == 9
    assert len(http.post("/models/llama2/generate_stream", json=body()).text.splitlines()) == 10
    assert len(http.post("/models/llama2", json=flagged).text.splitlines()) == 10
    assert http.post("/models/llama2", json=body()).json()["generated_tokens"] == 9


def test_a_stream_is_bare_json_lines_then_the_whole(http: httpx.Client) -> None:
    answer = http.post("/models/llama2/generate_stream", json=body())
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert len(lines) == 10
    assert all(line["event"] == "message" and line["retry"] == 30000 and len(line["data"]) == 1 for line in lines)
    *parts, last = [line["data"][0] for line in lines]
    assert all(set(part) == {"details", "generated_text", "tokens", "top_tokens"} for part in parts)
    assert all(part["top_tokens"] == [part["tokens"]] for part in parts)
    assert last == http.post("/models/llama2/generate", json=body()).json()
    assert "".join(part["generated_text"] for part in parts) == last["generated_text"]
    assert [part["tokens"] for part in parts] == last["tokens"]
    short = http.post("/models/llama2/generate_stream", json=body(return_full_text="False")).text.splitlines()
    assert short == answer.text.splitlines()[:-1]


def test_other_forms_of_the_stream(http: httpx.Client) -> None:
    path = "/models/llama2/generate_stream"
    plain = [json.loads(line) for line in http.post(path, json=body()).text.splitlines()]
    events = http.post(path, json=body(), headers={"accept": "text/event-stream"}).text
    assert events.endswith("\n\n")
    assert [json.loads(event.removeprefix("data: ")) for event in events.strip().split("\n\n")] == plain
    bare = http.post(path, json=body(return_protocol="text")).text.splitlines()
    assert all(line.startswith("data:{") for line in bare)
    assert [json.loads(line[5:]) for line in bare] == [line["data"][0] for line in plain]


def test_lines_survive_clients_that_split_at_unicode_line_ends(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\u2028b\x85\u00e9\U0001f98a"
    never = RequestMetrics(0.0, None, None, None)
    output = RequestOutput("r", None, [1], [5], text, "length", None, None, None, {}, never, None)

    async def steps(answer: Answer) -> AsyncIterator[list[tuple[int, Piece]]]:
        yield [(0, Piece([Token(5, text, text, {5: -0.5})], output))]

    monkeypatch.setattr(Answer, "steps", steps)
    content = http.post("/models/llama2/generate_stream", json=body()).content
    assert content.isascii()
    assert [json.loads(line)["data"][0]["generated_text"] for line in content.splitlines()] == [text, text]


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
            assert found["tokens"] == [{"id": 0, "logprob": 0.0, "special": False, "text": text}]


def test_out_of_range_begins_where_prompt_and_answer_reach_the_limit(start: Any) -> None:
    """As in the original, one token before the limit is the most."""
    small = start(max_model_len=40)
    room = 40 - len(small.service.tokenizer.encode(PROMPTS[2]))
    url = f"{small.url}/models/llama2/generate"
    texts = [
        requests.post(url, json=body(PROMPTS[2], max_new_tokens=count), timeout=60).json()["generated_text"]
        for count in (room - 1, room, room)  # one refusal does not leave another hanging
    ]
    assert texts[0] == offline(small, PROMPTS[2], room - 1)
    assert texts[1:] == ["Error202: prompt out of range"] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameters": {}},
        {"inputs": None},
        {"inputs": ["a"]},
        body(max_new_tokens="many"),
        body(max_new_tokens=0),
        body(max_new_tokens=-3),
        body(do_sample="maybe"),
        body(stop="a"),
        {**body(), "stream": "perhaps"},
        {**body(), "parameters": "do_sample"},
    ],
)
def test_bad_types_are_422_with_their_place(http: httpx.Client, wrong: dict[str, Any]) -> None:
    answer = http.post("/models/llama2/generate", json=wrong)
    assert answer.status_code == 422
    assert ": " in answer.json()["detail"]


def test_what_means_nothing_is_refused(http: httpx.Client) -> None:
    unknown = http.post("/models/gpt/generate", json=body())
    assert unknown.status_code == 404
    assert "llama2" in unknown.json()["detail"]
    for wrong in (body(seed=-1), body(repetition_penalty=0)):
        for path in ("generate", "generate_stream"):
            assert http.post(f"/models/llama2/{path}", json=wrong).status_code == 400


def test_a_failed_step_is_told_in_band_and_the_next_request_runs(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = start()
    runner = broken.service.engine.engine.runner
    execute = runner.execute

    def fail_once(plan: Any) -> Any:
        monkeypatch.setattr(runner, "execute", execute)
        raise RuntimeError("no memory")

    for path in ("generate", "generate_stream"):
        monkeypatch.setattr(runner, "execute", fail_once)
        answer = requests.post(f"{broken.url}/models/llama2/{path}", json=body(), timeout=60)
        found = json.loads(answer.text.splitlines()[-1])
        found = found["data"][0] if path == "generate_stream" else found
        assert found["generated_text"] == "error304: generation task stop abnormally!, please retry!"
        assert found["finish_reason"] == "predict_failed"
        good = requests.post(f"{broken.url}/models/llama2/generate", json=body(), timeout=60).json()
        assert good["finish_reason"] == "length"


def _event(url: str) -> Any:
    answer = requests.get(url, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    text = answer.text
    assert text.startswith("data: ")
    assert text.endswith("\n\n")
    found = json.loads(text[6:])
    assert set(found) == {"event", "retry", "data"}
    return found["data"]


def test_information_endpoints(server: Running) -> None:
    assert _event(f"{server.url}/serving/get_bs") == 128
    assert _event(f"{server.url}/serving/get_request_numbers") == 0
    info = _event(f"{server.url}/serving/get_serverd_model_info")
    assert set(info) == {
        "docker_label", "max_batch_total_tokens", "max_concurrent_requests", "max_input_length", "max_total_tokens",
        "model_device_type", "model_dtype", "model_id", "model_pipeline_tag", "version",
    }  # fmt: skip
    assert info["model_id"] == "demo"
    assert info["model_pipeline_tag"] == "text-generation"
    assert info["max_total_tokens"] == info["max_input_length"] == 1024
    assert info["max_batch_total_tokens"] == 128 * 1024


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ({}, {"max_tokens": 300, "temperature": 0.0, "top_k": 3, "top_p": 1.0, "repetition_penalty": 1.0, "stop": ()}),
        ({"do_sample": "True"}, {"temperature": 1.0}),
        ({"do_sample": "1"}, {"temperature": 1.0}),
        ({"do_sample": "False", "temperature": 0.8}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.0}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 1e-5}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 65536}, {"temperature": 65536.0}),
        ({"do_sample": True, "temperature": 70000}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": -1}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": float("nan")}, {"temperature": 0.0}),
        ({"do_sample": "True", "temperature": "0.8"}, {"temperature": 0.8}),
        ({"max_new_tokens": "12"}, {"max_tokens": 12}),
        ({"top_k": 0}, {"top_k": 1}),
        ({"top_k": -1}, {"top_k": 1}),
        ({"top_k": 99}, {"top_k": 99}),
        ({"top_k": 1024}, {"top_k": 1}),
        ({"top_k": 1023}, {"top_k": 100}),
        ({"top_p": 0}, {"top_p": 0.01}),
        ({"top_p": -1}, {"top_p": 0.01}),
        ({"top_p": 0.005}, {"top_p": 0.005}),  # only what lies outside (0, 1] is moved
        ({"top_p": 1.7}, {"top_p": 1.0}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"stop": ["a", ""]}, {"stop": ("a",)}),
        ({"seed": 7}, {"seed": 7}),
        ({"topk_k": 9, "watermark": "x", "typical_p": "y", "truncate": 5}, {"top_k": 3}),  # ignored
    ],
)
def test_defaults_and_clamps(asked: dict[str, Any], want: dict[str, Any]) -> None:
    found = sampling_params(Parameters(**asked), 1024, strict=False)
    assert {name: getattr(found, name) for name in want} == want


def test_strict_contest_copies_visible_quirks_and_only_then() -> None:
    ignored = {"repetition_penalty": -1, "seed": -1, "stop": ["a"]}
    found = sampling_params(Parameters(**ignored), 1024, strict=True)
    assert (found.temperature, found.repetition_penalty, found.seed, found.stop) == (1.0, 1.0, None, ())
    with pytest.raises(RequestError):
        sampling_params(Parameters(**ignored), 1024, strict=False)


def test_stop_strings_and_seeds_work_unless_strict(http: httpx.Client) -> None:
    whole = http.post("/models/llama2/generate", json=body(max_new_tokens=30)).json()["generated_text"]
    stop = whole[10:14]
    for path in ("generate", "generate_stream"):
        answer = http.post(f"/models/llama2/{path}", json=body(max_new_tokens=30, stop=[stop]))
        found = json.loads(answer.text.splitlines()[-1])
        found = found["data"][0] if path == "generate_stream" else found
        assert found["generated_text"] == whole[: whole.index(stop)]
        assert found["finish_reason"] == "stop"
    drawn = [
        http.post("/models/llama2/generate", json=body(do_sample="True", temperature=2.0, top_k=50, seed=seed)).json()
        for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0]["seed"] == 5
    assert drawn[0]["generated_text"] != drawn[2]["generated_text"]


def test_strict_contest_loses_the_last_text_and_nothing_else(start: Any, server: Running) -> None:
    strict = start(strict_contest=True)

    def ask(running: Running, path: str, prompt: str = PROMPTS[0], **parameters: Any) -> Any:
        answer = requests.post(f"{running.url}/models/llama2/{path}", json=body(prompt, **parameters), timeout=60)
        found = [_without_logprobs(json.loads(line)) for line in answer.text.splitlines()]
        return [line["data"][0] for line in found] if path == "generate_stream" else found[0]

    free, cut = ask(server, "generate"), ask(strict, "generate")
    assert cut["generated_text"] == "".join(token["text"] for token in free["tokens"][:-1]) != free["generated_text"]
    assert cut["tokens"] == [*free["tokens"][:-1], {**free["tokens"][-1], "text": "", "special": True}]
    assert cut["generated_tokens"] == 9
    *parts, last = ask(strict, "generate_stream")
    assert last == cut
    assert "".join(part["generated_text"] for part in parts) == cut["generated_text"]
    assert parts[-1]["generated_text"] == ""
    for path in ("generate", "generate_stream"):  # an answer that ends by itself is whole
        assert ask(strict, path, max_new_tokens=200) == ask(server, path, max_new_tokens=200)
    assert ask(strict, "generate", "")["generated_text"] != "Error203: prompt token empty"
    info = _event(f"{strict.url}/serving/get_serverd_model_info")
    assert (info["max_total_tokens"], info["max_concurrent_requests"], info["version"]) == (128, 0, "2.3")


def _without_logprobs(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_logprobs(inner) for key, inner in value.items() if key != "logprob"}
    return [_without_logprobs(inner) for inner in value] if isinstance(value, list) else value


def test_strict_contest_tells_logits_and_otherwise_probabilities(start: Any, server: Running) -> None:
    llm = type(server.llm)(server.llm.checkpoint.source, num_threads=1)
    rows = llm.generate(PROMPTS[0], SamplingParams(max_tokens=9, return_logits=True))[0].logits
    llm.close()
    assert rows is not None
    strict = start(strict_contest=True)
    for running, wanted in ((strict, rows.max(1)), (server, -np.log(np.exp(rows - rows.max(1)[:, None]).sum(1)))):
        answer = requests.post(f"{running.url}/models/llama2/generate", json=body(), timeout=60).json()
        assert [token["logprob"] for token in answer["tokens"]] == pytest.approx(wanted.tolist(), abs=1e-5)


class ArchivedClient:
    """Sends and reads as the contest's load generator does.

    A thread and a connection for each request; booleans as text; every line that is not empty is JSON; the answer is
    the last line's text, or all of them in a row without `return_full_text`.
    """

    def __init__(self, url: str, path: str = "generate_stream", full_text: bool = True) -> None:
        self.url = f"{url}/models/llama2/{path}"
        self.streams = path == "generate_stream"
        self.full_text = full_text
        self.results: list[dict[str, Any]] = []

    def send(self, prompt: str, count: int) -> None:
        parameters = {"max_new_tokens": count, "do_sample": "False", "return_full_text": str(self.full_text)}
        headers = {"Content-Type": "application/json", "Connection": "close"}
        began = time.time()
        answer = requests.post(
            self.url, headers=headers, json={"inputs": prompt, "parameters": parameters}, stream=self.streams
        )
        first_token_time, texts = 0.0, []
        if self.streams:
            for number, line in enumerate(answer.iter_lines(decode_unicode=True)):
                if line:
                    if number == 0:
                        first_token_time = time.time() - began
                    texts.append(json.loads(line)["data"][0]["generated_text"])
        else:
            texts = [json.loads(answer.text)["generated_text"]]
        text = texts[-1] if self.full_text or not self.streams else "".join(texts)
        self.results.append(
            {
                "input": prompt,
                "resp_text": text,
                "res_time": time.time() - began,
                "first_token_time": first_token_time,
            }
        )

    def send_all(self, prompts: list[str], count: int) -> None:
        threads = [threading.Thread(target=self.send, args=(prompt, count)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)


def test_the_contest_client_works_unchanged(server: Running) -> None:
    wanted = {prompt: offline(server, prompt, 20) for prompt in PROMPTS}
    for client in (
        ArchivedClient(server.url),
        ArchivedClient(server.url, full_text=False),
        ArchivedClient(server.url, "generate"),
    ):
        client.send_all(PROMPTS, 20)
        assert {one["input"]: one["resp_text"] for one in client.results} == wanted
        if client.streams:
            assert all(0 < one["first_token_time"] <= one["res_time"] for one in client.results)
