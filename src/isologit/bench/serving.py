"""A whole measurement of a server: prompts, warm-up, load, figures, verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from isologit.bench.arrivals import Seconds, contest_arrivals, random_arrivals, trace_arrivals
from isologit.bench.dialects import LoadRequest
from isologit.bench.load import LoadPlan, LoadRun, RequestRecord, ServerError, run_load
from isologit.bench.metrics import measure, output_lengths
from isologit.bench.options import ServingOptions
from isologit.bench.prompts import find_tokenizer, timed_requests, warmup_requests
from isologit.bench.result import build_result
from isologit.bench.verdict import judge
from isologit.common.progress import Observer, Progress, Silent
from isologit.common.verdict import Verdict

_CONTEST_MODEL = "llama2"
_ASK_S = 30.0


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


def measure_server(options: ServingOptions, *, detailed: bool = False, observer: Observer | None = None) -> Measurement:
    """Warm the server up, put the load on it and judge the run.

    Raises ServerError when the server cannot be reached or refuses the warm-up, DatasetError or ModelError for inputs
    that cannot be used. A request that fails during the run raises nothing: it makes the verdict INVALID.
    """
    observer = observer or Silent()
    observer.stage("prepare requests")
    tokenizer, tokenizer_name = find_tokenizer(options.tokenizer, options.model)
    requests = timed_requests(options, tokenizer)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    model = _model_name(options, headers)

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
            headers=headers,
        )

    timed = plan(requests, _arrivals(options, len(requests)))
    if options.num_warmups:
        observer.stage("warm up the server")
        _warm_up(plan(warmup_requests(options.num_warmups, requests, options.seed), np.zeros(options.num_warmups)))
    observer.stage("send requests")
    meter = _Meter(len(requests), observer)
    run = run_load(timed, meter.finished)
    observer.stage("count tokens")
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
    for record in run_load(plan).records:
        if record.status != "completed":
            raise ServerError(f"{plan.url}: a warm-up request failed: {record.error}; nothing was measured")


def _model_name(options: ServingOptions, headers: dict[str, str]) -> str:
    """The name asked for; else what an OpenAI-compatible server says it has, else the contest's."""
    if options.served_model_name is not None:
        return options.served_model_name
    if options.model is not None and not Path(options.model).exists():
        return options.model
    if options.backend.startswith("openai"):
        return asyncio.run(_served_model(options.server_url, headers))
    return _CONTEST_MODEL


async def _served_model(server_url: str, headers: dict[str, str]) -> str:
    url = f"{server_url}/v1/models"
    timeout = aiohttp.ClientTimeout(total=_ASK_S)
    try:
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session, session.get(url) as response:
            response.raise_for_status()
            found = await response.json(content_type=None)
            return str(found["data"][0]["id"])
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError) as error:
        raise ServerError(f"{url}: does not name a model ({error}); name it with --served-model-name") from None
