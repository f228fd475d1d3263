"""Whether a load run counts. Owns the rules and their codes; knows no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isologit.bench.records import LoadRun, RequestRecord
from isologit.common.verdict import Reason, Verdict

LAG_LIMIT = 0.01
_NAMED = 5  # ids named in a message


@dataclass(frozen=True)
class Lag:
    """How late the generator itself was: dispatch minus scheduled time, over all requests it got to.

    of_latency: mean lag in proportion to the mean latency of completed requests. of_duration: p99 of the lag in
    proportion to the duration. Each is the share by which a published figure could be wrong.
    """

    mean_ms: float
    p99_ms: float
    max_ms: float
    of_latency: float
    of_duration: float


def judge(run: LoadRun) -> Verdict:
    """Issued = completed + failed with each id once and none failed; and a generator less than 1 % late."""
    if reasons := _conservation(run):
        return Verdict.of(reasons)
    lag = measure_lag(run)
    if lag is not None and max(lag.of_latency, lag.of_duration) > LAG_LIMIT:
        message = (
            f"the load generator was late itself: {lag.mean_ms:.1f} ms on average, {100 * lag.of_latency:.1f} % of the "
            f"mean latency, with a p99 of {lag.p99_ms:.1f} ms, {100 * lag.of_duration:.1f} % of the duration; "
            f"{100 * LAG_LIMIT:g} % is allowed"
        )
        return Verdict("NOT CERTIFIED", (Reason("generator_lag", message),))
    return Verdict("VALID")


def _conservation(run: LoadRun) -> list[Reason]:
    reasons = []
    planned = Counter(request.id for request in run.plan.requests)
    seen = Counter(record.request.id for record in run.records)
    if not planned:
        reasons.append(Reason("no_requests", "no request was issued"))
    if twice := [name for name, count in planned.items() if count > 1]:
        reasons.append(Reason("duplicate_ids", f"{len(twice)} ids were issued more than once: {_some(twice)}"))
    if astray := list((planned - seen).keys() | (seen - planned).keys()):
        reasons.append(Reason("ids_differ", f"{len(astray)} ids are not both issued and recorded: {_some(astray)}"))
    total = len(run.records)
    if run.interrupted:
        ended = sum(record.status == "completed" for record in run.records)
        message = f"the run was interrupted by a signal after {run.duration_s:.1f} s, with {ended} of {total} answered"
        reasons.append(Reason("interrupted", message))
    if run.server_gone:
        reasons.append(Reason("server_gone", "the server stopped accepting connections during the run"))
    for status, code, words in (
        ("failed", "failed_requests", "failed"),
        ("unsent", "unsent_requests", "were never sent"),
        ("pending", "lost_requests", "have no outcome"),
    ):
        if lost := [record for record in run.records if record.status == status]:
            reasons.append(
                Reason(code, f"{len(lost)} of {total} requests {words}, first {lost[0].request.id}{_why(lost[0])}")
            )
    return reasons


def _why(record: RequestRecord) -> str:
    return f": {record.error}" if record.error else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def measure_lag(run: LoadRun) -> Lag | None:
    """None when nothing was dispatched or completed."""
    lags = np.array([r.dispatched_s - r.scheduled_s for r in run.records if r.dispatched_s is not None])
    latencies = [
        r.finished_s - r.scheduled_s for r in run.records if r.status == "completed" and r.finished_s is not None
    ]
    if not len(lags) or not latencies:
        return None
    mean, p99, largest = float(lags.mean()), float(np.percentile(lags, 99)), float(lags.max())
    return Lag(1e3 * mean, 1e3 * p99, 1e3 * largest, mean / float(np.mean(latencies)), p99 / run.duration_s)
