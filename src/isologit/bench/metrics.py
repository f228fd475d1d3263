"""Figures of a load run, under the names and by the definitions of `vllm bench serve`. Knows no file.

Differences, all against flattery: times count from the moment a request was due (`*_from_send` has vLLM's way), tokens
are counted by a tokenizer or by the server and never by chunks, and what was not measured is None instead of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from isologit.bench.load import LoadRun, RequestRecord
from isologit.bench.options import METRICS, Metric


class TokenCounter(Protocol):
    """What this room needs of a tokenizer."""

    def encode_without_bos(self, text: str) -> list[int]:
        """Token ids of the text alone."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One completed request in milliseconds, counted from its scheduled or its send time.

    ttft: to the first token. e2el: to the end of the answer. tpot: (e2el - ttft) / (output tokens - 1), None with one
    token or an unknown number. itl: gaps between messages that carried tokens.
    """

    ttft: float
    e2el: float
    tpot: float | None
    itl: Sequence[float]


def output_lengths(records: Sequence[RequestRecord], tokenizer: TokenCounter | None) -> list[int | None]:
    """Output tokens of each record: by the tokenizer, else by the server's own count, else None; 0 when it failed."""

    def length(record: RequestRecord) -> int | None:
        if record.status != "completed":
            return 0
        return record.reported_tokens if tokenizer is None else len(tokenizer.encode_without_bos(record.text))

    return [length(record) for record in records]


def measured(record: RequestRecord, num_tokens: int | None, *, from_send: bool = False) -> Measured:
    """The times of a completed record."""
    zero = record.sent_s if from_send else record.scheduled_s
    assert zero is not None
    assert record.first_token_s is not None
    assert record.finished_s is not None
    ttft, e2el = 1000 * (record.first_token_s - zero), 1000 * (record.finished_s - zero)
    tpot = (e2el - ttft) / (num_tokens - 1) if num_tokens is not None and num_tokens > 1 else None
    return Measured(ttft, e2el, tpot, (1000 * np.diff(record.token_times_s)).tolist())


def measure(
    run: LoadRun,
    lengths: Sequence[int | None],
    *,
    metrics: Sequence[Metric] = METRICS,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """vLLM's flat keys. `lengths` are output tokens [n]; `goodput` maps ttft, tpot or e2el to the milliseconds allowed.

    A request without a known time per token counts as within any, as in vLLM.
    """
    completed = [(r, n) for r, n in zip(run.records, lengths, strict=True) if r.status == "completed"]
    seconds = run.duration_s
    inputs = _total([record.request.prompt_len for record, _ in completed])
    outputs = _total([length for _, length in completed])
    found = [measured(record, length) for record, length in completed]
    good = None if not goodput else sum(_is_good(one, goodput) for one in found)
    figures: dict[str, Any] = {
        "duration": seconds,
        "issued": len(run.records),
        "completed": len(completed),
        "failed": len(run.records) - len(completed),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": _per_second(len(completed), seconds),
        "request_goodput": None if good is None else _per_second(good, seconds),
        "output_throughput": _per_second(outputs, seconds),
        "total_token_throughput": None if inputs is None or outputs is None else _per_second(inputs + outputs, seconds),
        "max_concurrent_requests": _max_concurrent(run.records),
    }
    sent = [measured(record, length, from_send=True) for record, length in completed]
    for metric in metrics:
        figures |= _spread(f"{metric}_ms", _values(found, metric), percentiles)
        if metric in ("ttft", "e2el"):  # the others do not depend on when the request was sent
            figures |= _spread(f"{metric}_ms_from_send", _values(sent, metric), percentiles)
    return figures


def _values(found: Sequence[Measured], metric: Metric) -> list[float]:
    if metric == "itl":
        return [gap for one in found for gap in one.itl]
    return [value for one in found if (value := getattr(one, metric)) is not None]


def _spread(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    keys = [f"mean_{name}", f"median_{name}", f"std_{name}", *(f"p{p:g}_{name}" for p in percentiles)]
    if not values:
        return dict.fromkeys(keys)
    array = np.array(values)
    figures = [array.mean(), np.median(array), array.std(), *np.percentile(array, percentiles)]
    return {key: float(figure) for key, figure in zip(keys, figures, strict=True)}


def _is_good(one: Measured, limits: Mapping[str, float]) -> bool:
    return all((getattr(one, name) or 0.0) <= limit for name, limit in limits.items())


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _per_second(count: int | None, seconds: float) -> float | None:
    return None if count is None or seconds <= 0 else count / seconds


def _max_concurrent(records: Sequence[RequestRecord]) -> int:
    """Most requests that were being answered at one moment."""
    events = [(r.sent_s, 1) for r in records if r.sent_s is not None and r.finished_s is not None]
    events += [(r.finished_s, -1) for r in records if r.sent_s is not None and r.finished_s is not None]
    most = now = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most
