"""Load runs made by hand, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from isologit.bench.dialects import DIALECTS, LoadRequest
from isologit.bench.records import LoadPlan, LoadRun, RequestRecord


def record(name: str = "0", **fields: Any) -> RequestRecord:
    """Completed: due at 1 s, sent at 1.5 s, three tokens at 2, 2.5 and 3 s, done at 3 s."""
    usual: dict[str, Any] = {
        "scheduled_s": 1.0,
        "dispatched_s": 1.0,
        "sent_s": 1.5,
        "token_times_s": [2.0, 2.5, 3.0],
        "finished_s": 3.0,
        "status": "completed",
        "text": "a b c",
        "finish_reason": "length",
        "reported_tokens": 3,
    }
    return RequestRecord(LoadRequest(name, f"prompt {name}", None, 4, 3), **{**usual, **fields})


def load_run(records: Sequence[RequestRecord], *, requests: Sequence[LoadRequest] | None = None) -> LoadRun:
    planned = [one.request for one in records] if requests is None else list(requests)
    arrivals = np.array([one.scheduled_s for one in records])
    plan = LoadPlan("http://127.0.0.1:1/x", DIALECTS["llm-serving"], "llama2", planned, arrivals)
    duration = max((one.finished_s or 0.0 for one in records), default=0.0)
    return LoadRun(plan, list(records), 1.7e9, duration, server_gone=False)
