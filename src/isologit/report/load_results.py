"""The result files of load runs as the page needs them, ours or those of `vllm bench serve`.

Any key may be missing: what depends on it is then None or empty. It does not know how the page looks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isologit.report.svg import Floats

_ALWAYS = ("request_throughput", "duration", "completed")  # keys by which a load result is known


@dataclass(frozen=True, slots=True)
class Requests:
    """Times of the answered requests in the order they were due; arrays are [n], seconds since the first was due.

    itl holds all gaps between streamed tokens, tpot the requests with more than one token. due_s also has the requests
    that failed.
    """

    ids: list[str]
    due_s: Floats
    scheduled_s: Floats
    sent_s: Floats
    first_token_s: Floats
    finished_s: Floats
    tpot_s: Floats
    itl_s: Floats


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One file. `requests` is None when it was saved without its lists."""

    name: str
    data: Mapping[str, Any]
    requests: Requests | None

    @property
    def rate(self) -> float:
        """Requests a second that were offered; infinite for all at once."""
        return float(self.data.get("request_rate", math.inf))

    @property
    def verdict(self) -> str:
        """VALID, INVALID, NOT CERTIFIED, or NOT CHECKED for a file that does not say."""
        return str(self.data.get("verdict", "NOT CHECKED"))

    @property
    def label(self) -> str:
        """The rate in words."""
        return "all at once" if math.isinf(self.rate) else f"{self.rate:g}/s"

    def figure(self, key: str) -> float | None:
        """A number of the file, or None."""
        value = self.data.get(key)
        return None if value is None else float(value)


def read_load_results(folder: Path) -> list[LoadResult]:
    """The load results among a folder's JSON files, by rate and then by name; other files are passed over."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(data, dict) and all(isinstance(data.get(key), int | float) for key in _ALWAYS):
            found.append(LoadResult(path.name, data, _requests(data)))
    return sorted(found, key=lambda result: result.rate)


def _requests(data: Mapping[str, Any]) -> Requests | None:
    start, ttft = data.get("start_times"), data.get("ttfts")
    if not start or not ttft:
        return None
    count = len(start)
    errors = data.get("errors") or [""] * count
    itls: Sequence[Sequence[float]] = data.get("itls") or [[]] * count
    statuses = data.get("statuses") or ["failed" if error else "completed" for error in errors]
    ids = data.get("request_ids") or [str(i) for i in range(count)]
    # vLLM's older files have no latencies; there the last token ends the answer.
    latency = data.get("latencies") or [(t or 0.0) + sum(gaps) for t, gaps in zip(ttft, itls, strict=True)]
    sent = data.get("send_times") or start
    tokens = data.get("output_lens") or [None] * count
    kept = [i for i in np.argsort(start, kind="stable").tolist() if statuses[i] == "completed"]
    if not kept:
        return None
    zero = min(start)
    scheduled = np.array([start[i] for i in kept]) - zero
    many = [i for i in kept if tokens[i] is not None and tokens[i] > 1]
    return Requests(
        ids=[str(ids[i]) for i in kept],
        due_s=np.sort(np.array(start, float)) - zero,
        scheduled_s=scheduled,
        sent_s=np.array([sent[i] for i in kept]) - zero,
        first_token_s=scheduled + np.array([ttft[i] for i in kept]),
        finished_s=scheduled + np.array([latency[i] for i in kept]),
        tpot_s=np.array([(latency[i] - ttft[i]) / (tokens[i] - 1) for i in many]),
        itl_s=np.array([gap for i in kept for gap in itls[i]]),
    )
