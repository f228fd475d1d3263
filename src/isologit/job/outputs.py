"""Post-processing: what was kept while running, as the lines of `outputs.jsonl` and `steps.jsonl`.

Times of later segments are moved behind those of earlier ones, so that they read as one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from isologit.job.journal import FinishedRequest
from isologit.job.preprocess import Prepared
from isologit.job.state import Segment
from isologit.workload import BadRequest

_STEP_TIMES = ("start_s", "end_s")


def segment_offsets(segments: Sequence[Segment]) -> list[float]:
    """Seconds of inference before each segment."""
    offsets = [0.0]
    for segment in segments:
        offsets.append(offsets[-1] + (segment.inference_s or 0.0))
    return offsets


def output_lines(
    prepared: Prepared, finished: Mapping[str, FinishedRequest], segments: Sequence[Segment]
) -> Iterator[dict[str, Any]]:
    """One line for every request of the dataset, in its order; those that could not run have only their error."""
    offsets, limits = segment_offsets(segments), prepared.max_tokens
    for entry in prepared.order:
        if isinstance(entry, BadRequest):
            yield _refused_line(entry)
        elif entry in finished:
            yield _finished_line(finished[entry], limits[entry], offsets)


def step_lines(steps: Iterable[Mapping[str, Any]], segments: Sequence[Segment]) -> Iterator[dict[str, Any]]:
    """The engine's steps of all segments."""
    offsets = segment_offsets(segments)
    for step in steps:
        offset = offsets[step["segment"]]
        yield {**step, **{name: round(step[name] + offset, 6) for name in _STEP_TIMES}}


def _finished_line(request: FinishedRequest, max_tokens: int, offsets: Sequence[float]) -> dict[str, Any]:
    offset = offsets[request.segment]
    return {
        "id": request.request_id,
        "prompt": request.prompt,
        "text": request.text,
        "prompt_token_ids": request.prompt_token_ids,
        "token_ids": request.token_ids,
        "max_tokens": max_tokens,
        "finish_reason": request.finish_reason,
        "stop_reason": request.stop_reason,
        "error": request.error,
        "metrics": {k: None if v is None else round(v + offset, 6) for k, v in request.metrics.items()},
        "segment": request.segment,
    }


def _refused_line(bad: BadRequest) -> dict[str, Any]:
    return {
        "id": bad.id,
        "prompt": bad.prompt,
        "text": "",
        "prompt_token_ids": [],
        "token_ids": [],
        "max_tokens": None,
        "finish_reason": "error",
        "stop_reason": None,
        "error": f"{bad.where}: {bad.error}",
        "metrics": None,
        "segment": None,
    }
