"""GET /metrics as Prometheus reads it: vLLM's names, and counters that add up to what was sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
from benchmarks.soak import Metrics, read_metrics
from prometheus_client.parser import text_string_to_metric_families
from tests.server.conftest import NAME, Running
from tests.server.tools import PROMPT, SPOKEN, raw_request, steps_of, until

from isologit.config import EngineOptions

FOX = "Describe the fox.\n"  # the demo model ends its answer by itself


def metrics(server: Running) -> Metrics:
    answer = httpx.get(f"{server.url}/metrics", timeout=20)
    assert answer.headers["content-type"].startswith("text/plain")
    return read_metrics(answer.text)


def post(server: Running, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


def test_names_types_and_the_model_label(server: Running) -> None:
    families = list(text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text))
    types = {family.name: family.type for family in families}
    assert types == {
        "vllm:num_requests_running": "gauge",
        "vllm:num_requests_waiting": "gauge",
        "vllm:kv_cache_usage_perc": "gauge",
        "vllm:prompt_tokens": "counter",
        "vllm:generation_tokens": "counter",
        "vllm:request_success": "counter",
        "vllm:time_to_first_token_seconds": "histogram",
        "vllm:inter_token_latency_seconds": "histogram",
        "vllm:time_per_output_token_seconds": "histogram",
        "vllm:request_time_per_output_token_seconds": "histogram",
        "vllm:e2e_request_latency_seconds": "histogram",
        "isologit:requests_unanswered": "counter",
        "isologit:http_responses": "counter",
        "isologit:tasks": "gauge",
    }
    assert all(family.documentation for family in families)
    assert {sample.labels["model_name"] for family in families for sample in family.samples} == {NAME}
    assert {"vllm:request_success_total{stop}", "vllm:request_success_total{length}"} <= set(metrics(server))


def test_counters_add_up_exactly(start: Callable[..., Running]) -> None:
    server = start()
    prompt_tokens = output_tokens = steps = 0
    reasons = {"stop": 0, "length": 0}
    for spoken in SPOKEN:
        for stream in (False, True):
            for tokens in (1, 7, 300):
                assert post(server, *spoken.request(FOX, tokens, stream=stream)).status_code == 200
                usage = post(server, "/v1/completions", SPOKEN[1].body(FOX, tokens)).json()
                count = usage["usage"]["completion_tokens"]
                reasons[usage["choices"][0]["finish_reason"]] += 2
                prompt_tokens += 2 * usage["usage"]["prompt_tokens"]
                output_tokens += 2 * count
                steps += 2 * (count - 1)
    body = {"model": NAME, "prompt": [PROMPT, "List 4 tools."], "n": 3, "max_tokens": 4, "ignore_eos": True}
    usage = post(server, "/v1/completions", body).json()["usage"]
    prompt_tokens += 3 * usage["prompt_tokens"]  # every choice is a request of its own here
    output_tokens += usage["completion_tokens"]
    reasons["length"] += 6
    steps += 6 * 3
    found = metrics(server)
    assert found["vllm:prompt_tokens_total"] == prompt_tokens
    assert found["vllm:generation_tokens_total"] == output_tokens
    assert found["vllm:request_success_total{stop}"] == reasons["stop"] > 0
    assert found["vllm:request_success_total{length}"] == reasons["length"] > 0
    assert found["isologit:requests_unanswered_total"] == 0
    requests = sum(reasons.values())
    assert found["vllm:time_to_first_token_seconds_count"] == requests
    assert found["vllm:e2e_request_latency_seconds_count"] == requests
    assert found["vllm:inter_token_latency_seconds_count"] == steps  # without speculation a step brings one token
    for end in ("count", "sum"):
        name = "time_per_output_token_seconds"
        assert found[f"vllm:{name}_{end}"] == found[f"vllm:inter_token_latency_seconds_{end}"]
    assert 0 < found["vllm:request_time_per_output_token_seconds_count"] < requests  # not those of one token
    assert 0 < found["vllm:time_to_first_token_seconds_sum"] < found["vllm:e2e_request_latency_seconds_sum"]


def test_gauges_follow_what_runs_and_waits(start: Callable[..., Running]) -> None:
    server = start(engine=EngineOptions(max_num_seqs=2))
    idle = metrics(server)
    assert [idle[f"vllm:{n}"] for n in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")] == [
        0.0
    ] * 3
    threads = [threading.Thread(target=post, args=(server, *SPOKEN[1].request(tokens=40))) for _ in range(5)]
    with steps_of(server, 0.02):
        for thread in threads:
            thread.start()
        until(lambda: server.service.engine.num_unfinished == 5 and server.service.engine.num_waiting == 3)
        busy = metrics(server)
        assert (busy["vllm:num_requests_running"], busy["vllm:num_requests_waiting"]) == (2, 3)
        assert 0 < busy["vllm:kv_cache_usage_perc"] < 1
        for thread in threads:
            thread.join(60)
    server.wait_idle()
    assert {
        **metrics(server),
    }["vllm:kv_cache_usage_perc"] == 0


def test_what_is_not_answered_is_counted_apart(start: Callable[..., Running]) -> None:
    server = start(max_body_bytes=5000)
    with steps_of(server, 0.02) as steps:
        connection = raw_request(server.url, *SPOKEN[0].request(tokens=200, stream=True))
        steps.wait_for(2)
        connection.close()
        server.wait_idle()
        steps.failures.append(RuntimeError())
        post(server, *SPOKEN[1].request())
    post(server, "/v1/completions", {"model": "none", "prompt": "a"})
    post(server, "/generate", {"inputs": "a" * 6000})
    post(server, "/generate", {})
    found = metrics(server)
    assert found["isologit:requests_unanswered_total"] == 2
    assert sum(value for name, value in found.items() if name.startswith("vllm:request_success_total")) == 0
    counts = {name: value for name, value in found.items() if name.startswith("isologit:http_responses_total")}
    prefix = "isologit:http_responses_total"
    assert {name.removeprefix(prefix): value for name, value in counts.items()} == {
        "{200}": 1, "{500}": 1, "{404}": 1, "{413}": 1, "{422}": 1,
    }  # fmt: skip
