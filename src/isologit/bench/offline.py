"""The engine's own throughput and latency, in this process and without HTTP; keys as in vLLM's commands."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from isologit.common.environment import describe_environment
from isologit.engine.request import GenerationRequest, RequestOutput, SamplingParams
from isologit.errors import RequestError

PERCENTAGES = (10, 25, 50, 75, 90, 99)


class Runs(Protocol):
    """What this room needs of an engine; `isologit.LLM` has it."""

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[RequestOutput]: ...
    def warm_up(self) -> None: ...
    def describe(self) -> dict[str, Any]: ...


def measure_throughput(
    llm: Runs, requests: Sequence[GenerationRequest], on_finished: Callable[[RequestOutput], object] | None = None
) -> dict[str, Any]:
    """Run all requests once after a warm-up; seconds, requests and tokens per second, prompt tokens included.

    Raises RequestError when a request can never run or fails on the way.
    """
    llm.warm_up()
    outputs = []
    start = time.perf_counter()
    for output in llm.run(requests):
        outputs.append(output)
        if on_finished is not None:
            on_finished(output)
    elapsed = time.perf_counter() - start
    _require_whole(requests, outputs)
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = sum(len(output.token_ids) for output in outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": prompt_tokens + output_tokens,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": (prompt_tokens + output_tokens) / elapsed,
        "total_output_tokens": output_tokens,
        "output_tokens_per_second": output_tokens / elapsed,
        **_where(llm),
    }


def measure_latency(
    llm: Runs,
    requests: Sequence[GenerationRequest],
    *,
    num_iters: int,
    num_iters_warmup: int,
    on_iteration: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Run one batch again and again; the seconds of each time, their mean, deviation and percentiles.

    Raises RequestError when a request can never run or fails on the way.
    """
    llm.warm_up()
    latencies: list[float] = []
    for iteration in range(num_iters_warmup + num_iters):
        start = time.perf_counter()
        outputs = list(llm.run(requests))
        seconds = time.perf_counter() - start
        _require_whole(requests, outputs)
        if iteration >= num_iters_warmup:
            latencies.append(seconds)
        if on_iteration is not None:
            on_iteration(iteration + 1)
    array = np.array(latencies)
    percentiles = np.percentile(array, PERCENTAGES).tolist()
    return {
        "avg_latency": float(array.mean()),
        "std_latency": float(array.std()),
        "latencies": latencies,
        "percentiles": {str(p): value for p, value in zip(PERCENTAGES, percentiles, strict=True)},
        **_where(llm),
    }


def random_batch(
    batch_size: int, input_len: int, output_len: int, *, vocab_size: int, seed: int
) -> list[GenerationRequest]:
    """Requests of `input_len` random token ids and exactly `output_len` output tokens each."""
    rng = random.Random(seed)
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    return [
        GenerationRequest(str(i), [rng.randrange(vocab_size) for _ in range(input_len)], params)
        for i in range(batch_size)
    ]


def _require_whole(requests: Sequence[GenerationRequest], outputs: Sequence[RequestOutput]) -> None:
    """A request that failed must not make a time look better."""
    failed = next((output for output in outputs if output.error is not None), None)
    if failed is not None:
        raise RequestError(f"request {failed.request_id} failed: {failed.error}; nothing was measured")
    if len(outputs) != len(requests):
        raise RequestError(f"{len(outputs)} of {len(requests)} requests came back; nothing was measured")


def _where(llm: Runs) -> dict[str, Any]:
    return {"engine": llm.describe(), "environment": describe_environment()}
