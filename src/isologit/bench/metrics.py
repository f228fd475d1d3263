"""Figures of a load run, under the names and by the definitions of `vllm bench serve`. Knows no file.

Differences, all against flattery: times count from the moment a request was due (`*_from_send` has vLLM's way), tokens
are counted by the server or by a tokenizer and never by chunks, and what was not measured is None instead of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from isologit.bench.options import METRICS, Metric
from isologit.bench.records import LoadRun, RequestRecord


class TokenCounter(Protocol):
    """What this room needs of a tokenizer."""

    def encode_without_bos(self, text: str) -> list[int]:
        """Token ids of the text alone."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One completed request in milliseconds, counted from its scheduled or its send time.

    ttft: to the first token. e2el: to the end of the answer. tpot: (e2el - ttft) / (output tokens - 1), None with one
    token, an unknown number, or all of them in one message. itl: gaps between messages that carried tokens.
    """

    ttft: float
    e2el: float
    tpot: float | None
    itl: Sequence[float]


def output_lengths(records: Sequence[RequestRecord], tokenizer: TokenCounter | None) -> list[int | None]:
    """Output tokens of each record: by the server's own count, else by the tokenizer, else None; 0 when it failed.

    NOTE: only the server knows; a text is not always cut again into the tokens it was made of.
    """

    def length(record: RequestRecord) -> int | None:
        if record.status != "completed":
            return 0
        if record.reported_tokens is not None or tokenizer is None:
            return record.reported_tokens
        return len(tokenizer.encode_without_bos(record.text))

    return [length(record) for record in records]


def input_length(record: RequestRecord) -> int | None:
    """Prompt tokens: by the server's own count, which knows its chat template, else by the tokenizer, else None."""
    return record.request.prompt_len if record.reported_prompt_tokens is None else record.reported_prompt_tokens


def counted_by(records: Sequence[RequestRecord], tokenizer_name: str | None) -> str | None:
    """Who counted the output tokens of completed records, in words; None when somebody did not."""
    missing = [record.reported_tokens is None for record in records if record.status == "completed"]
    if not any(missing):
        return "the server" if missing else None
    if tokenizer_name is None:
        return None
    by_tokenizer = f"the tokenizer of {tokenizer_name}"
    return by_tokenizer if all(missing) else f"the server and {by_tokenizer}"


def measured(record: RequestRecord, num_tokens: int | None, *, from_send: bool = False) -> Measured:
    """The times of a completed record."""
    zero = record.sent_s if from_send else record.scheduled_s
    assert zero is not None
    assert record.first_token_s is not None
    assert record.finished_s is not None
    ttft, e2el = 1000 * (record.first_token_s - zero), 1000 * (record.finished_s - zero)
    gaps = np.diff(record.token_times_s)
    tpot = (e2el - ttft) / (num_tokens - 1) if num_tokens is not None and num_tokens > 1 and len(gaps) else None
    return Measured(ttft, e2el, tpot, (1000 * gaps).tolist())


def measure(
    run: LoadRun,
    lengths: Sequence[int | None],
    *,
    metrics: Sequence[Metric] = METRICS,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """vLLM's flat keys. `lengths` are output tokens [n]; `goodput` maps ttft, tpot or e2el to the milliseconds allowed.

    An answer of one token has no time per token and counts as within any, as in vLLM.
    """
    completed = [(r, n) for r, n in zip(run.records, lengths, strict=True) if r.status == "completed"]
    seconds = run.duration_s
    inputs = _total([input_length(record) for record, _ in completed])
    outputs = _total([length for _, length in completed])
    found = [measured(record, length) for record, length in completed]
    good = _goodput(found, [length for _, length in completed], goodput or {})
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


def _goodput(found: Sequence[Measured], lengths: Sequence[int | None], limits: Mapping[str, float]) -> int | None:
    """Requests within the limits; None without limits, or when a time that is limited is not known."""
    unknown = any(one.tpot is None and (n is None or n > 1) for one, n in zip(found, lengths, strict=True))
    if not limits or ("tpot" in limits and unknown):
        return None
    return sum(_is_good(one, limits) for one in found)


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
