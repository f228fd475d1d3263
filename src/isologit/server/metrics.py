"""Counters in Prometheus' format, with vLLM's names where they mean the same."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from isologit.server.engine_thread import AsyncEngine

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class ServerMetrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()

        def make(kind: type, name: str, text: str, **more: Any) -> Any:
            return kind(name, text, ("model_name",), registry=self.registry, **more).labels(model_name)

        self._running = make(Gauge, "vllm:num_requests_running", "Requests that hold a slot.")
        self._waiting = make(Gauge, "vllm:num_requests_waiting", "Requests without a slot.")
        self._kv = make(Gauge, "vllm:kv_cache_usage_perc", "Share of key/value blocks in use; 1 is all.")
        self._prompt = make(Counter, "vllm:prompt_tokens", "Prompt tokens of requests taken.")
        self._generated = make(Counter, "vllm:generation_tokens", "Output tokens delivered.")
        self._success = Counter(
            "vllm:request_success",
            "Finished requests by reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._model_name = model_name
        self._unanswered = make(Counter, "isologit:requests_unanswered", "Requests that failed or were cancelled.")
        self._ttft = make(Histogram, "vllm:time_to_first_token_seconds", "To the first token.", buckets=_SECONDS)
        self._itl = make(Histogram, "vllm:inter_token_latency_seconds", "Between tokens.", buckets=_SECONDS)
        self._e2e = make(Histogram, "vllm:e2e_request_latency_seconds", "To the whole answer.", buckets=_SECONDS)

    def watch(self, num_prompt_tokens: int) -> RequestWatch:
        """Begin to time a request."""
        self._prompt.inc(num_prompt_tokens)
        return RequestWatch(self)

    def render(self, engine: AsyncEngine) -> bytes:
        """The text of `GET /metrics`."""
        scheduler = engine.engine.scheduler
        blocks = scheduler.blocks
        self._running.set(scheduler.num_running)
        self._waiting.set(engine.num_waiting)
        self._kv.set(1 - blocks.num_free / blocks.num_blocks)
        return generate_latest(self.registry)


class RequestWatch:
    """The clock of one request."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._start = self._last = time.perf_counter()
        self._first = True
        self._done = False

    def tokens(self, count: int) -> None:
        """So many tokens arrived together."""
        metrics, now = self._metrics, time.perf_counter()
        (metrics._ttft if self._first else metrics._itl).observe(now - self._last)
        metrics._generated.inc(count)
        self._first, self._last = False, now

    def finished(self, reason: str) -> None:
        """The answer is complete."""
        metrics = self._metrics
        self._done = True
        metrics._success.labels(metrics._model_name, reason).inc()
        metrics._e2e.observe(time.perf_counter() - self._start)

    def close(self) -> None:
        """Whatever happened, it is over."""
        if not self._done:
            self._metrics._unanswered.inc()
