"""The engine loop: schedule, execute, commit, file. Offline generation and any server drive this same object.

Owns what requests gather while they run. It does not know where requests come from, nor who reads their text.
"""

from __future__ import annotations

import time

import numpy as np

from isologit.engine.captured_rows import CapturedRows, Finals
from isologit.engine.output_text import OutputText
from isologit.engine.progress import Progress, StepDelta
from isologit.engine.request import GenerationRequest, RequestOutput, Sequence
from isologit.engine.runner import Runner, StepResult
from isologit.engine.sampler import Sampler
from isologit.engine.scheduler import ScheduledSequence, Scheduler, StepPlan
from isologit.engine.step_record import StepRecord
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
        self.tokenizer = tokenizer
        self.step_records: list[StepRecord] = []
        self.deltas: list[StepDelta] = []  # of the last step
        self._seed = seed
        self._raw_logits = raw_logits
        self._streaming = streaming
        self._keep_hidden = keep_hidden
        self._zero_s = zero_s
        self._num_added = 0
        self._captured = CapturedRows(runner.backend.project)
        self._progress: dict[str, Progress] = {}

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._zero_s

    def add(self, request: GenerationRequest, *, arrival_s: float | None = None) -> None:
        """Queue a request, which arrives now unless told. Raises RequestError as `Scheduler.add`."""
        params = request.params
        seed = params.seed if params.seed is not None else [self._seed, self._num_added]
        self._num_added += 1
        seq = Sequence(request)
        seq.arrival_s = self.now() if arrival_s is None else arrival_s
        stop_ids = [*self.scheduler.config.eos_token_ids, *params.stop_token_ids]
        # NOTE: bad words may be refused; nothing is kept of a request until nothing can be
        sampler = Sampler(params, np.random.default_rng(seed), stop_ids=stop_ids, tokenizer=self.tokenizer)
        text = None
        if self.tokenizer is not None:
            inner = request.is_continued and any(map(self.tokenizer.is_text, request.prompt_token_ids))
            text = OutputText(self.tokenizer, params, inner=inner)
        self.scheduler.add(seq)
        self._progress[request.request_id] = Progress(seq, text, sampler)

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
        self.scheduler.drop_running()
        lost = [request_id for request_id in self._progress if not self.scheduler.is_live(request_id)]
        for request_id in lost:
            self.runner.forget(request_id)
            del self._progress[request_id]
        return lost

    def has_work(self) -> bool:
        """Whether any request is waiting, running, or finished and not handed out."""
        return self.scheduler.has_work() or bool(self._captured)

    def step(self) -> list[RequestOutput]:
        """One step of the model; returns the requests that finished in it."""
        start = self.now()
        self.deltas = []
        plan = self.scheduler.schedule()
        scheduled = self.now()
        if plan is None:
            return self._hand_out(self.scheduler.take_finished())
        result = self.runner.execute(plan)
        executed = self.now()
        rows = zip(plan.sequences, result.first_rows, strict=True)
        chosen = [self._choose(entry, result, row) for entry, row in rows]
        sampled = self.now()
        finished = self.scheduler.commit(plan, chosen)
        committed = self.now()
        finished += self._file(plan, result, scheduled, committed)
        filed = self.now()
        outputs = self._hand_out(finished)
        drafted = [entry for entry in plan.sequences if entry.draft_token_ids]
        self.step_records.append(
            StepRecord(
                start_s=start,
                end_s=self.now(),
                schedule_s=scheduled - start,
                execute_s=executed - scheduled,
                sample_s=sampled - executed,
                capture_s=filed - committed,
                num_tokens=plan.num_tokens,
                num_logits=len(result.argmax),
                num_seqs=len(plan.sequences),
                num_draft_tokens=sum(len(entry.draft_token_ids) for entry in drafted),
                num_accepted_tokens=sum(max(0, entry.num_accepted - 1) for entry in drafted),
            )
        )
        return outputs

    def _choose(self, entry: ScheduledSequence, result: StepResult, row: int) -> list[int]:
        """The token after each of the sequence's rows that choose one, -1 where the logits are NaN."""
        tokens: list[int] = result.argmax[row : row + entry.num_logits].tolist()
        seq = entry.seq
        if entry.num_scored and result.argmax[row - entry.num_scored : row].min() < 0:
            self.scheduler.fail(seq, "the model's logits for a token of the prompt are NaN")
        if tokens and tokens[0] >= 0 and seq.needs_row:
            sampler = self._progress[seq.request.request_id].sampler
            tokens[0] = sampler.choose(result.logits(row), seq.token_ids, seq.num_prompt_tokens)
        return tokens

    def _file(self, plan: StepPlan, result: StepResult, scheduled_s: float, committed_s: float) -> list[Sequence]:
        """Give each request what it gained; returns those that a stop string ends."""
        stopped: list[Sequence] = []
        for entry, row in zip(plan.sequences, result.first_rows, strict=True):
            seq = entry.seq
            if seq.scheduled_s is None:
                seq.scheduled_s = scheduled_s
            if entry.num_scored and seq.error is None:
                self._progress[seq.request.request_id].score_prompt(entry, result, row, raw_logits=self._raw_logits)
            if not entry.num_accepted:
                continue
            if seq.first_token_s is None:
                seq.first_token_s = committed_s
            if not (seq.is_watched or self._streaming):
                continue
            params = seq.request.params
            progress = self._progress[seq.request.request_id]
            shown: list[str] = []
            text = progress.text
            if text is not None and (params.stop or self._streaming):
                shown = progress.read(seq.token_ids[-entry.num_accepted :])
                if text.stop is not None and self.scheduler.stop(entry, len(shown), text.stop):
                    stopped.append(seq)
            if seq.request.capture or params.return_logits or params.logprobs is not None:
                progress.gather(entry, result, row, raw_logits=self._raw_logits)
            if self._streaming:
                hidden = None
                if self._keep_hidden:
                    hidden = result.output.final[row : row + entry.num_accepted].copy()
                self.deltas.append(progress.delta(entry, shown, hidden))
        return stopped

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
        """NOTE: what these requests hold here goes only once all outputs exist, so that `drop_running` finds them."""
        now = self.now()
        progresses = [self._progress[seq.request.request_id] for seq in finished]
        outputs = [(progress.output(now), progress.finals) for progress in progresses]
        for output, _ in outputs:
            self.runner.forget(output.request_id)
            del self._progress[output.request_id]
        return outputs
