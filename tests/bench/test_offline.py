"""Offline figures are of whole runs only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from isologit.bench.offline import PERCENTAGES, measure_latency, measure_throughput, random_batch
from isologit.engine.request import GenerationRequest, RequestMetrics, RequestOutput
from isologit.errors import RequestError


class Echo:
    """Answers at once; the request named in `broken` fails, the one in `lost` never comes back."""

    def __init__(self, *, broken: str | None = None, lost: str | None = None) -> None:
        self.broken, self.lost, self.runs, self.warm = broken, lost, 0, False

    def warm_up(self) -> None:
        self.warm = True

    def describe(self) -> dict[str, Any]:
        return {"device": "none"}

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[RequestOutput]:
        self.runs += 1
        for request in requests:
            if request.request_id != self.lost:
                yield RequestOutput(
                    request_id=request.request_id,
                    prompt=None,
                    prompt_token_ids=request.prompt_token_ids,
                    token_ids=[1] * request.params.max_tokens,
                    text="",
                    finish_reason="length",
                    stop_reason=None,
                    logprobs=None,
                    logits=None,
                    captured={},
                    metrics=RequestMetrics(0.0, 0.0, 0.0, 0.0),
                    error="no" if request.request_id == self.broken else None,
                )


BATCH = random_batch(3, 5, 7, vocab_size=50, seed=1)


def test_random_batches_have_their_lengths_and_seed() -> None:
    assert [len(request.prompt_token_ids) for request in BATCH] == [5, 5, 5]
    assert {request.params.max_tokens for request in BATCH} == {7}
    assert all(request.params.ignore_eos for request in BATCH)
    assert random_batch(3, 5, 7, vocab_size=50, seed=1) == BATCH
    assert random_batch(3, 5, 7, vocab_size=50, seed=2) != BATCH


def test_throughput_counts_every_token() -> None:
    engine, seen = Echo(), []
    found = measure_throughput(engine, BATCH, lambda output: seen.append(output.request_id))
    assert engine.warm
    assert seen == ["0", "1", "2"]
    assert found["num_requests"] == 3
    assert found["total_num_tokens"] == 3 * (5 + 7)
    assert found["total_output_tokens"] == 21
    assert found["tokens_per_second"] == pytest.approx(36 / found["elapsed_time"])
    assert found["environment"]["cores"]


def test_latency_leaves_the_warm_up_out() -> None:
    engine, seen = Echo(), []
    found = measure_latency(engine, BATCH, num_iters=4, num_iters_warmup=2, on_iteration=seen.append)
    assert engine.runs == 6
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(found["latencies"]) == 4
    assert list(found["percentiles"]) == [str(p) for p in PERCENTAGES]
    assert min(found["latencies"]) <= found["percentiles"]["50"] <= max(found["latencies"])


@pytest.mark.parametrize("engine", [Echo(broken="1"), Echo(lost="1")])
def test_a_lost_request_gives_no_figure(engine: Echo) -> None:
    with pytest.raises(RequestError, match="nothing was measured"):
        measure_throughput(engine, BATCH)
    with pytest.raises(RequestError, match="nothing was measured"):
        measure_latency(engine, BATCH, num_iters=1, num_iters_warmup=0)
