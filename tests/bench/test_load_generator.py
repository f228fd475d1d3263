"""The load is open loop, every request has an outcome, and whatever is not a whole answer is a failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from tests.bench.fake_server import FAILURES, FakeServer, fake_server

from isologit.bench.contest import contest_line
from isologit.bench.dialects import DIALECTS, LoadRequest
from isologit.bench.load import ServerError, run_load
from isologit.bench.records import LoadPlan, LoadRun
from isologit.bench.verdict import judge

BACKENDS = sorted(DIALECTS)


def _requests(prompts: Sequence[str], max_new_tokens: int = 3) -> list[LoadRequest]:
    return [LoadRequest(f"r{i}", prompt, None, 2, max_new_tokens) for i, prompt in enumerate(prompts)]


def _plan(
    server: FakeServer,
    requests: list[LoadRequest],
    arrival_s: Sequence[float] | None = None,
    *,
    backend: str = "llm-serving",
    max_concurrency: int | None = None,
) -> LoadPlan:
    return LoadPlan(
        url=server.url + DIALECTS[backend].endpoint.format(model="llama2"),
        dialect=DIALECTS[backend],
        model="llama2",
        requests=requests,
        arrival_s=np.zeros(len(requests)) if arrival_s is None else np.array(arrival_s, float),
        max_concurrency=max_concurrency,
    )


def _codes(run: LoadRun) -> list[str]:
    return [reason.code for reason in judge(run).reasons]


@pytest.mark.parametrize(("backend", "sse"), [*((name, False) for name in BACKENDS), ("llm-serving", True)])
def test_every_dialect_is_answered_whole(backend: str, sse: bool) -> None:
    with fake_server(sse=sse, token_s=0.01) as server:
        run = run_load(_plan(server, _requests(["a", "b"]), backend=backend))
    assert [record.status for record in run.records] == ["completed"] * 2
    assert [record.text for record in run.records] == ["w0 w1 w2 "] * 2
    assert [record.reported_tokens for record in run.records] == [3, 3]
    for record in run.records:
        assert len(record.token_times_s) == 3
        assert record.sent_s is not None
        assert record.finished_s is not None
        times = [record.scheduled_s, record.sent_s, *record.token_times_s, record.finished_s]
        assert times == sorted(times)
    assert not run.server_gone


def test_the_contests_client_is_imitated_to_the_letter() -> None:
    with fake_server() as server:
        run_load(_plan(server, _requests(["hello"], 7)))
    assert server.paths == ["/models/llama2/generate_stream"]
    parameters = {"max_new_tokens": 7, "do_sample": "False", "return_full_text": "True"}
    assert server.bodies == [{"inputs": "hello", "parameters": parameters}]
    assert server.headers[0]["Connection"] == "close"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_fails_its_request_alone_and_the_run(backend: str, failure: str) -> None:
    with fake_server() as server:
        run = run_load(_plan(server, _requests(["a", f"fail:{failure}", "b"]), backend=backend))
    assert [record.status for record in run.records] == ["completed", "failed", "completed"]
    assert run.records[1].error
    assert judge(run).status == "INVALID"
    assert _codes(run) == ["failed_requests"]
    assert "All Tasks Done" not in contest_line(run)


def test_a_late_answer_delays_no_other_request() -> None:
    """Inverse: with one slot on this side it does."""
    arrivals = [0.0, 0.02, 0.04, 0.06]
    with fake_server(token_s=0.1) as server:
        open_loop = run_load(_plan(server, _requests("abcd"), arrivals))
        closed = run_load(_plan(server, _requests("abcd"), arrivals, max_concurrency=1))
    for record in open_loop.records:
        assert record.sent_s == pytest.approx(record.scheduled_s, abs=0.05)
    assert open_loop.duration_s < 0.6
    assert closed.duration_s > 1.1
    last = closed.records[-1]
    assert last.sent_s is not None
    assert last.sent_s > 0.9
    assert last.dispatched_s == pytest.approx(last.scheduled_s, abs=0.05)


@pytest.mark.parametrize("max_concurrency", [None, 1])
def test_a_server_that_dies_ends_the_run_within_seconds(max_concurrency: int | None) -> None:
    with fake_server(token_s=0.05) as server:
        requests = _requests(["x"] * 40, 60)
        killer = threading.Timer(1.8, server.stop)
        killer.start()
        start = time.monotonic()
        arrivals = np.linspace(0, 60, 40).tolist()
        run = run_load(_plan(server, requests, arrivals, max_concurrency=max_concurrency))
        seconds = time.monotonic() - start
        killer.join()
    assert seconds < 5
    assert run.server_gone
    assert {record.status for record in run.records} == {"failed", "unsent"}
    assert all(record.error for record in run.records)
    assert judge(run).status == "INVALID"
    assert _codes(run) == ["server_gone", "failed_requests", "unsent_requests"]


def test_nobody_listening_is_an_error_before_the_run() -> None:
    with fake_server() as server:
        plan = _plan(server, _requests("a"))
    with pytest.raises(ServerError, match="nobody answers at http://127"):
        run_load(plan)


def test_hundreds_at_once_all_come_back() -> None:
    finished: list[str] = []
    with fake_server() as server:
        requests = _requests([f"prompt {i}" for i in range(300)])
        run = run_load(_plan(server, requests), lambda record: finished.append(record.request.id))
    assert {record.status for record in run.records} == {"completed"}
    assert sorted(finished) == sorted(request.id for request in requests)
    assert sorted(body["inputs"] for body in server.bodies) == sorted(request.prompt or "" for request in requests)
