"""The timed inference: requests through the engine, each kept on disk as it finishes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from isologit.common.progress import Observer
from isologit.engine.request import GenerationRequest
from isologit.job.engine import Engine
from isologit.job.folder import OutputFolder
from isologit.job.journal import Journal
from isologit.job.meter import InferenceMeter
from isologit.job.state import RunState, Segment


def infer(
    requests: Sequence[GenerationRequest],
    engine: Engine,
    journal: Journal,
    state: RunState,
    segment: Segment,
    folder: OutputFolder,
    observer: Observer,
) -> None:
    """Run what is not finished yet as a new segment of the run, and record how it ended.

    An interruption (KeyboardInterrupt) passes through once everything that the engine handed over is on disk; a request
    whose captured rows were still to be made (half a second at most) runs again after a resume.
    """
    left = [request for request in requests if request.request_id not in journal.finished]
    if not left:
        return
    state.segments.append(segment)
    state.save(folder)
    number = len(state.segments) - 1
    lengths = {request.request_id: request.params.max_tokens for request in left}
    meter = InferenceMeter(engine, observer, list(lengths.values()))
    start = time.perf_counter()
    segment.ended = "interrupted"
    try:
        with meter.running():
            for output in engine.run(left):
                found = journal.append(output, number)
                journal.append_steps(engine.step_records, number)
                meter.finished(len(found.token_ids), lengths[found.request_id])
        segment.ended = "complete"
    finally:
        segment.inference_s = time.perf_counter() - start
        journal.append_steps(engine.step_records, number, now=True)
        state.save(folder)
