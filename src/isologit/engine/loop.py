"""The engine loop: schedule, execute, commit, file. Offline generation and any server drive this same object.

What requests gather is in `LiveRequests`. It does not know where requests come from, nor who reads their text.
"""

from __future__ import annotations

import time

from isologit.engine.captured_rows import CapturedRows, Finals
from isologit.engine.live_requests import LiveRequests
from isologit.engine.pipeline import Pipeline
from isologit.engine.progress import StepDelta
from isologit.engine.request import GenerationRequest, RequestOutput, Sequence
from isologit.engine.runner import Runner
from isologit.engine.scheduler import Scheduler
from isologit.engine.step_record import Moments, StepRecord
from isologit.text.tokenizer import Tokenizer


class EngineLoop:
    """Runs requests to completion, one step at a time.

    streaming: whether every step's `deltas` are wanted; without, text is made when a request is over.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: Tokenizer | None,
        *,
        seed: int,
        zero_s: float,
        raw_logits: bool = False,
        streaming: bool = False,
        keep_hidden: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.step_records: list[StepRecord] = []
        self._zero_s = zero_s
        self._pipeline = Pipeline(scheduler, runner)
        self._captured = CapturedRows(runner.backend.project)
        self._live = LiveRequests(
            scheduler, tokenizer, seed=seed, raw_logits=raw_logits, streaming=streaming, keep_hidden=keep_hidden
        )

    @property
    def deltas(self) -> list[StepDelta]:
        """New tokens of the last step, of every request that got some; only if streaming."""
        return self._live.deltas

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._zero_s

    def add(self, request: GenerationRequest, *, arrival_s: float | None = None) -> None:
        """Queue a request, which arrives now unless told. Raises RequestError as `Scheduler.add`."""
        seq = Sequence(request)
        seq.arrival_s = self.now() if arrival_s is None else arrival_s
        self._live.add(seq)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request; its blocks come back at once. None if it is not here."""
        seq = self.scheduler.abort(request_id)
        if seq is None:
            return None
        outputs = self._outputs([seq])
        self._captured.fill(outputs)
        return outputs[0][0]

    def drop_running(self) -> list[str]:
        """Give up what ran, or had just finished, when a step raised; returns the ids of the requests."""
        self._pipeline.drop()
        self.scheduler.drop_running()
        lost = self._live.drop_lost()
        for request_id in lost:
            self.runner.forget(request_id)
        return lost

    def has_work(self) -> bool:
        """Whether any request is waiting, running, or finished and not handed out, or a step runs ahead."""
        return self.scheduler.has_work() or bool(self._captured) or bool(self._pipeline)

    def step(self) -> list[RequestOutput]:
        """Commit one step of the model; returns the requests that finished in it."""
        start = self.now()
        step = self._pipeline.next()
        if step is None:
            self._live.deltas = []
            return self._hand_out(self.scheduler.take_finished())
        plan, result = step.plan, step.result
        num_rows = len(result.argmax)  # waits for the device
        executed = self.now()
        rows = zip(plan.sequences, result.first_rows, strict=True)
        chosen = [self._live.choose(entry, result, row) for entry, row in rows]
        sampled = self.now()
        finished = self.scheduler.commit(plan, chosen)
        committed = self.now()
        finished += self._live.file(plan, result, step.at - self._zero_s, committed)
        filed = self.now()
        outputs = self._hand_out(finished)
        moments = Moments(start, start + self._pipeline.schedule_s, executed, sampled, committed, filed, self.now())
        self.step_records.append(StepRecord.of(plan, num_rows, moments))
        return outputs

    def _hand_out(self, finished: list[Sequence]) -> list[RequestOutput]:
        """Outputs to return now; those with captured rows may have to wait for others."""
        ready: list[RequestOutput] = []
        now = self.now()
        for output, finals in self._outputs(finished):
            if finals:
                self._captured.hold(output, finals, now)
            else:
                ready.append(output)
        if not self.scheduler.has_work() or self._captured.is_due(now):
            ready += self._captured.take()
        return ready

    def _outputs(self, finished: list[Sequence]) -> list[tuple[RequestOutput, Finals]]:
        outputs = self._live.take(finished, self.now())
        for output, _ in outputs:
            self.runner.forget(output.request_id)
        return outputs
