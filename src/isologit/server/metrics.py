"""Counters in Prometheus' format, with vLLM's names where they mean the same.

Plain numbers that only the event loop touches, because some are counted for every token; they become Prometheus' own
objects when somebody asks.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from isologit.engine.async_engine import AsyncEngine, Delta

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class _Histogram:
    """How many durations fell into each bucket, and their sum."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and cumulative counts."""
        bounds = [*map(str, _SECONDS), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class ServerMetrics(Collector):
    """The metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str, engine: AsyncEngine) -> None:
        self._model_name = model_name
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()  # by reason
        self.unanswered = 0
        self.responses: Counter[int] = Counter()  # by HTTP status
        self.ttft, self.itl, self.tpot, self.e2e = (_Histogram() for _ in range(4))

    def watch(self, num_prompt_tokens: int) -> RequestWatch:
        """Begin to time a request."""
        self.prompt_tokens += num_prompt_tokens
        return RequestWatch(self)

    def render(self) -> bytes:
        """The text of `GET /metrics`."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        scheduler = self._engine.engine.scheduler
        blocks = scheduler.blocks
        yield self._gauge("vllm:num_requests_running", "Requests that hold a slot.", scheduler.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests without a slot.", self._engine.num_waiting)
        used = 1 - blocks.num_free / blocks.num_blocks
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of key/value blocks in use; 1 is all.", used)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens of requests taken.", self.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Output tokens of all requests.", self.generation_tokens)
        tasks = len(asyncio.all_tasks())
        yield self._gauge("isologit:tasks", "Asynchronous tasks of the server, this request's included.", tasks)
        reasons = CounterMetricFamily(
            "vllm:request_success", "Finished requests by reason.", labels=("model_name", "finished_reason")
        )
        for reason in sorted({"stop", "length", *self.finished}):
            reasons.add_metric((self._model_name, reason), self.finished[reason])
        yield reasons
        yield self._counter("isologit:requests_unanswered", "Requests that failed or were cancelled.", self.unanswered)
        responses = CounterMetricFamily("isologit:http_responses", "Responses begun.", labels=("model_name", "status"))
        for status, count in sorted(self.responses.items()):
            responses.add_metric((self._model_name, str(status)), count)
        yield responses
        for name, text, found in (
            ("vllm:time_to_first_token_seconds", "From arrival to the first token.", self.ttft),
            ("vllm:inter_token_latency_seconds", "Between the steps that brought a request tokens.", self.itl),
            ("vllm:time_per_output_token_seconds", "The same; the name that it had before.", self.itl),
            ("vllm:request_time_per_output_token_seconds", "Mean of a request, its first token apart.", self.tpot),
            ("vllm:e2e_request_latency_seconds", "From arrival to the last token.", self.e2e),
        ):
            histogram = HistogramMetricFamily(name, text, labels=("model_name",))
            histogram.add_metric((self._model_name,), found.buckets(), found.sum_s)
            yield histogram

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family


class RequestWatch:
    """The clock of one request."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._start_s = self._first_s = self._last_s = time.perf_counter()
        self._first = True
        self._done = False

    def observe(self, delta: Delta) -> None:
        """A step brought the request something."""
        metrics = self._metrics
        if delta.token_ids:
            (metrics.ttft if self._first else metrics.itl).observe(delta.at_s - self._last_s)
            metrics.generation_tokens += len(delta.token_ids)
            if self._first:
                self._first, self._first_s = False, delta.at_s
            self._last_s = delta.at_s
        if delta.output is not None:
            self._done = True
            metrics.finished[delta.output.finish_reason] += 1
            metrics.e2e.observe(delta.at_s - self._start_s)
            rest = len(delta.output.token_ids) - 1
            if rest > 0:
                metrics.tpot.observe((self._last_s - self._first_s) / rest)

    def close(self) -> None:
        """Whatever happened, it is over."""
        if not self._done:
            self._done = True
            self._metrics.unanswered += 1
