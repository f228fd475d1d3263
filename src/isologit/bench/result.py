"""The result file of a load run: vLLM's keys, and what they lack. Owns names; computes only hashes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from typing import Any

from isologit.bench.metrics import counted_by, input_length, measured
from isologit.bench.options import ServingOptions, plain
from isologit.bench.records import LoadRun, RequestRecord
from isologit.bench.verdict import measure_lag
from isologit.common.environment import describe_environment
from isologit.common.verdict import Verdict

FORMAT_VERSION = 1
_MAX_FAILURES = 100
_DIGITS = 6  # microseconds


def build_result(
    options: ServingOptions,
    run: LoadRun,
    figures: Mapping[str, Any],
    lengths: Sequence[int | None],
    verdict: Verdict,
    *,
    tokenizer_name: str | None,
    detailed: bool,
) -> dict[str, Any]:
    """The object to save. `figures` come from `metrics.measure`, `lengths` are output tokens [n].

    detailed: also vLLM's lists with an entry per request. `start_times`, like `ttfts` and `latencies`, count from the
    time a request was due; `send_times` are when it was sent. A failed request has None for times it does not have.
    """
    started = datetime.fromtimestamp(run.started_at).astimezone()
    lag = measure_lag(run)
    reported = [record.reported_tokens for record in run.records if record.status == "completed"]
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "date": started.strftime("%Y%m%d-%H%M%S"),
        "started_at": started.isoformat(timespec="seconds"),
        "backend": options.backend,
        "endpoint_type": options.backend,
        "url": run.plan.url,
        "model_id": run.plan.model,
        "tokenizer_id": tokenizer_name,
        "output_tokens_counted_by": counted_by(run.records, tokenizer_name),
        "num_prompts": len(run.plan.requests),
        "request_rate": plain(_request_rate(options, run)),
        "burstiness": plain(options.burstiness),
        "max_concurrency": options.max_concurrency,
        **figures,
        "reported_output_tokens": None if None in reported else sum(count or 0 for count in reported),
        **verdict.to_dict(),
        "lag": None if lag is None else asdict(lag),
        "failures": _failures(run.records),
        "seed": options.seed,
        "options": options.to_dict(),
        "environment": _environment(),
        "hashes": _hashes(run, options),
    }
    return {**result, **_details(run, lengths)} if detailed else result


def _request_rate(options: ServingOptions, run: LoadRun) -> float:
    """Requests a second that were asked for; of a trace, those it has between its first and its last."""
    if options.arrival_trace is None:
        return options.request_rate
    last_s = float(run.plan.arrival_s[-1])
    return round((len(run.plan.requests) - 1) / last_s, 3) if last_s else math.inf


def _failures(records: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    lost = [record for record in records if record.status != "completed"]
    return [{"id": r.request.id, "status": r.status, "error": r.error} for r in lost[:_MAX_FAILURES]]


def _environment() -> dict[str, Any]:
    found = describe_environment()
    return {**found, "versions": {**found["versions"], "aiohttp": version("aiohttp")}}


def _hashes(run: LoadRun, options: ServingOptions) -> dict[str, str]:
    """SHA-256 of what was asked, of how it was asked, and of what was answered."""
    requests = [[r.id, r.prompt, r.prompt_token_ids, r.max_new_tokens] for r in run.plan.requests]
    texts = {record.request.id: record.text for record in run.records}
    values = {
        "requests": requests,
        "options": options.to_dict(),
        "arrivals": run.plan.arrival_s.tolist(),
        "texts": texts,
    }
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in values.items()}


def _details(run: LoadRun, lengths: Sequence[int | None]) -> dict[str, list[Any]]:
    records = run.records
    done = [measured(r, n) if r.status == "completed" else None for r, n in zip(records, lengths, strict=True)]
    return {
        "request_ids": [record.request.id for record in records],
        "statuses": [record.status for record in records],
        "finish_reasons": [record.finish_reason for record in records],
        "input_lens": [input_length(record) for record in records],
        "output_lens": list(lengths),
        "start_times": [_rounded(record.scheduled_s) for record in records],
        "send_times": [_rounded(record.sent_s) for record in records],
        "ttfts": [None if one is None else _rounded(one.ttft / 1e3) for one in done],
        "itls": [[] if one is None else [_rounded(gap / 1e3) for gap in one.itl] for one in done],
        "latencies": [None if one is None else _rounded(one.e2el / 1e3) for one in done],
        "generated_texts": [record.text for record in records],
        "errors": [record.error or "" for record in records],
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, _DIGITS)
