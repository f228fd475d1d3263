"""A whole measurement of a server: prompts, warm-up, load, figures, verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isologit.bench.arrivals import Seconds, contest_arrivals, random_arrivals, trace_arrivals
from isologit.bench.dialects import LoadRequest
from isologit.bench.load import ServerError, nobody_answers, run_load
from isologit.bench.metrics import TokenCounter, measure, output_lengths
from isologit.bench.options import ServingOptions
from isologit.bench.prompts import find_tokenizer, timed_requests, warmup_requests
from isologit.bench.records import LoadPlan, LoadRun, RequestRecord
from isologit.bench.result import build_result
from isologit.bench.served import served_models
from isologit.bench.verdict import judge
from isologit.common.progress import Observer, Progress, Silent
from isologit.common.signals import interrupts_deferred
from isologit.common.verdict import Verdict

_CONTEST_MODEL = "llama2"


@dataclass(frozen=True)
class Measurement:
    """A finished load run, its figures as the result file has them, and whether it counts."""

    run: LoadRun
    result: dict[str, Any]
    verdict: Verdict

    @property
    def file_name(self) -> str:
        """vLLM's kind of name: backend, rate, concurrency and time."""
        found = self.result
        limit = f"-concurrency{found['max_concurrency']}" if found["max_concurrency"] else ""
        return f"{found['backend']}-{found['request_rate']}qps{limit}-{found['date']}.json"


def measure_server(
    options: ServingOptions,
    *,
    detailed: bool = False,
    observer: Observer | None = None,
    keep: Callable[[Measurement], object] | None = None,
) -> Measurement:
    """Warm the server up, put the load on it and judge the run.

    keep: is given the measurement where no signal can come between the run and its file. A run that a signal ended is
    measured and kept like any other; its verdict says so.

    Raises ServerError when the server cannot be reached or refuses the warm-up, DatasetError or ModelError for inputs
    that cannot be used. A request that fails during the run raises nothing: it makes the verdict INVALID.
    """
    observer = observer or Silent()
    observer.stage("prepare requests")
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    served = _models(options, headers)
    model = _model_name(options, served)
    tokenizer, tokenizer_name = find_tokenizer(options.tokenizer, options.model, served)
    requests = timed_requests(options, tokenizer)

    def plan(chosen: Sequence[LoadRequest], arrival_s: Seconds) -> LoadPlan:
        path = options.endpoint or options.dialect.endpoint.format(model=model)
        return LoadPlan(
            url=options.server_url + path,
            dialect=options.dialect,
            model=model,
            requests=chosen,
            arrival_s=arrival_s,
            max_concurrency=options.max_concurrency,
            ignore_eos=options.ignore_eos,
            request_timeout_s=options.request_timeout,
            headers=headers,
        )

    timed = plan(requests, _arrivals(options, len(requests)))
    if options.num_warmups:
        observer.stage("warm up the server")
        _warm_up(plan(warmup_requests(options.num_warmups, requests, options.seed), np.zeros(options.num_warmups)))
    observer.stage("send requests")
    meter = _Meter(len(requests), observer)
    with interrupts_deferred():  # but for those that end the load early
        run = run_load(timed, meter.finished)
        measurement = _figures(options, run, tokenizer, tokenizer_name, detailed=detailed)
        if keep is not None:
            keep(measurement)
    return measurement


def _figures(
    options: ServingOptions,
    run: LoadRun,
    tokenizer: TokenCounter | None,
    tokenizer_name: str | None,
    *,
    detailed: bool,
) -> Measurement:
    """What the run shows."""
    lengths = output_lengths(run.records, tokenizer)
    figures = measure(
        run,
        lengths,
        metrics=options.percentile_metrics,
        percentiles=options.metric_percentiles,
        goodput=options.goodput,
    )
    verdict = judge(run)
    result = build_result(options, run, figures, lengths, verdict, tokenizer_name=tokenizer_name, detailed=detailed)
    return Measurement(run, result, verdict)


class _Meter:
    """Counts requests that ended."""

    def __init__(self, total: int, observer: Observer) -> None:
        self._total = total
        self._observer = observer
        self._done = 0

    def finished(self, record: RequestRecord) -> None:
        self._done += 1
        self._observer.progress(Progress(self._done, self._total, self._done / self._total))


def _arrivals(options: ServingOptions, n: int) -> Seconds:
    if options.arrival_trace is not None:
        return trace_arrivals(options.arrival_trace, n)
    if options.contest_arrivals:
        return contest_arrivals(n, options.request_rate, seed=options.seed)
    return random_arrivals(n, options.request_rate, burstiness=options.burstiness, seed=options.seed)


def _warm_up(plan: LoadPlan) -> None:
    run = run_load(plan)
    if run.interrupted:
        raise KeyboardInterrupt
    for record in run.records:
        if record.status != "completed":
            raise ServerError(f"{plan.url}: a warm-up request failed: {record.error}; nothing was measured")


def _models(options: ServingOptions, headers: Mapping[str, str]) -> list[str]:
    """Names of the server's models; none where the name is given and the server does not say."""
    try:
        return asyncio.run(served_models(options.server_url, headers))
    except ServerError:
        if options.backend.startswith("openai") and _named(options) is None:
            raise
        if why := asyncio.run(nobody_answers(options.server_url)):
            raise ServerError(why) from None
        return []


def _named(options: ServingOptions) -> str | None:
    """The model's name where the options tell it."""
    if options.served_model_name is not None:
        return options.served_model_name
    return options.model if options.model is not None and not Path(options.model).exists() else None


def _model_name(options: ServingOptions, served: Sequence[str]) -> str:
    """The name asked for; else what an OpenAI-compatible server says it has, else the contest's."""
    if named := _named(options):
        return named
    return served[0] if options.backend.startswith("openai") else _CONTEST_MODEL
