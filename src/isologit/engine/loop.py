"""The engine loop: schedule, execute, commit. Offline generation and any server drive this same object.

Owns the mapping from running sequences to outputs (text, captured rows, log-probabilities). It does not know where
requests come from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from isologit.engine.request import GenerationRequest, RequestMetrics, RequestOutput, Sequence
from isologit.engine.runner import Runner, StepResult
from isologit.engine.sampler import choose_token, needs_row, top_logprobs
from isologit.engine.scheduler import ScheduledSequence, Scheduler
from isologit.errors import IsologitError

_LONGEST_HOLD_S = 0.5  # for the output of a request that has captured rows
LAST_TOKEN = -1  # in `GenerationRequest.capture`: the row of whatever output token turns out to be the last


class TextDecoder(Protocol):
    """What the loop needs of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        """Text of output token ids, special tokens skipped."""


class StepError(IsologitError):
    """A step produced something no request can use (NaN logits)."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did and how long its parts took, in seconds; `start_s` and `end_s` count from the start of the run.

    execute_s: building the batch and the model's step. sample_s: choosing tokens beyond the model's own argmax.
    capture_s: keeping what the request asked for; the rows that are captured are made in a product, which is the
    model's time.
    """

    start_s: float
    end_s: float
    schedule_s: float
    execute_s: float
    sample_s: float
    capture_s: float
    num_tokens: int
    num_logits: int
    num_seqs: int
    num_draft_tokens: int
    num_accepted_tokens: int


@dataclass(frozen=True, slots=True)
class Gain:
    """Output tokens that a request gained in a step, and their log-probabilities if it asked for them."""

    request_id: str
    token_ids: list[int]
    logprobs: list[dict[int, float]]


@dataclass(slots=True)
class _Progress:
    """What a running request has gathered besides its tokens."""

    rng: np.random.Generator
    captured: dict[int, np.ndarray]  # float32 [hidden], from which the logits are made
    logits: list[np.ndarray]
    logprobs: list[dict[int, float]]


class EngineLoop:
    """Runs requests to completion, one step at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: TextDecoder | None,
        *,
        seed: int,
        zero_s: float,
        raw_logits: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.step_records: list[StepRecord] = []
        self._gained: list[tuple[Sequence, int, _Progress]] = []  # of the last step: who, and what they had before
        self._seed = seed
        self._raw_logits = raw_logits
        self._zero_s = zero_s
        self._num_added = 0
        self._held: list[RequestOutput] = []  # finished, their captured rows not yet made
        self._held_since = 0.0
        self._progress: dict[str, _Progress] = {}

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._zero_s

    def add(self, request: GenerationRequest) -> None:
        """Queue a request."""
        seed = request.params.seed if request.params.seed is not None else [self._seed, self._num_added]
        self._num_added += 1
        seq = Sequence(request)
        seq.arrival_s = self.now()
        if request.params.stop:
            seq.drafts_from = seq.max_total_tokens  # a stop string is looked for after every token
        self.scheduler.add(seq)
        self._progress[request.request_id] = _Progress(np.random.default_rng(seed), {}, [], [])

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request; its blocks come back at once. None if it is not here."""
        seq = self.scheduler.abort(request_id)
        if seq is None:
            return None
        outputs = self._hand_out([seq])
        self._fill_captured(outputs)
        return outputs[0]

    @property
    def gains(self) -> list[Gain]:
        """What requests gained in the last step."""
        return [
            Gain(
                seq.request.request_id,
                seq.token_ids[seq.num_prompt_tokens + before :],
                progress.logprobs[before:],
            )
            for seq, before, progress in self._gained
        ]

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
        return self.scheduler.has_work() or bool(self._held)

    def step(self) -> list[RequestOutput]:
        """One step of the model; returns the requests that finished in it."""
        start = self.now()
        plan = self.scheduler.schedule()
        scheduled = self.now()
        self._gained = []
        if plan is None:
            return self._deliver(self.scheduler.take_finished())
        for scheduled_seq in plan.sequences:
            if scheduled_seq.seq.scheduled_s is None:
                scheduled_seq.seq.scheduled_s = scheduled
        result = self.runner.execute(plan)
        executed = self.now()
        before = [s.seq.num_output_tokens for s in plan.sequences]
        chosen = [self._choose(s, result, row) for s, row in zip(plan.sequences, result.first_rows, strict=True)]
        sampled = self.now()
        finished = self.scheduler.commit(plan, chosen)
        committed = self.now()
        self._gained = [
            (s.seq, count, self._progress[s.seq.request.request_id])
            for s, count in zip(plan.sequences, before, strict=True)
            if s.num_accepted
        ]
        drafts = accepted = 0
        for scheduled_seq, row, first_index in zip(plan.sequences, result.first_rows, before, strict=True):
            self._collect(scheduled_seq, result, row, first_index, committed)
            if scheduled_seq.draft_token_ids:
                drafts += len(scheduled_seq.draft_token_ids)
                accepted += max(0, scheduled_seq.num_accepted - 1)
        collected = self.now()
        finished += self._finish_by_stop_string(plan.sequences)
        outputs = self._deliver(finished)
        self.step_records.append(
            StepRecord(
                start,
                self.now(),
                scheduled - start,
                executed - scheduled,
                sampled - executed,
                collected - committed,
                plan.num_tokens,
                len(result.argmax),
                len(plan.sequences),
                drafts,
                accepted,
            )
        )
        return outputs

    def _choose(self, scheduled: ScheduledSequence, result: StepResult, row: int) -> list[int]:
        count = scheduled.num_logits
        tokens: list[int] = result.argmax[row : row + count].tolist()
        if -1 in tokens:
            raise StepError(f"request {scheduled.seq.request.request_id}: the model produced NaN logits")
        seq = scheduled.seq
        params = seq.request.params
        if count and seq.forced_tokens is None and needs_row(params, seq.num_output_tokens):
            rng = self._progress[seq.request.request_id].rng
            tokens[0] = choose_token(
                result.logits(row),
                params,
                seq.token_ids,
                seq.num_output_tokens,
                self.scheduler.config.eos_token_ids,
                rng,
            )
        return tokens

    def _collect(
        self,
        scheduled: ScheduledSequence,
        result: StepResult,
        row: int,
        first_index: int,
        now: float,
    ) -> None:
        """Keep the rows a request asked for, of the tokens it really gained."""
        seq = scheduled.seq
        if scheduled.num_accepted == 0:
            return
        if first_index == 0:
            seq.first_token_s = now
        request = seq.request
        params = request.params
        if not (request.capture or params.return_logits or params.logprobs is not None):
            return
        progress = self._progress[request.request_id]
        final = result.output.final
        for i in range(scheduled.num_accepted):
            index = first_index + i
            if index in request.capture:
                progress.captured[index] = final[row + i].copy()
            if params.return_logits:
                progress.logits.append(result.logits(row + i).copy())
            if params.logprobs is not None:
                token = seq.token_ids[seq.num_prompt_tokens + index]
                normaliser = 0.0 if self._raw_logits else result.log_normaliser(row + i)
                progress.logprobs.append(top_logprobs(result.logits(row + i), token, params.logprobs, normaliser))
        if LAST_TOKEN in request.capture and seq.finish_reason is not None:
            progress.captured[seq.num_output_tokens - 1] = final[row + scheduled.num_accepted - 1].copy()

    def _finish_by_stop_string(self, sequences: list[ScheduledSequence]) -> list[Sequence]:
        stopped = []
        for scheduled in sequences:
            seq = scheduled.seq
            stops = seq.request.params.stop
            if not stops or not scheduled.num_accepted or seq.finish_reason is not None or self.tokenizer is None:
                continue
            text = self.tokenizer.decode(seq.output_token_ids)
            hit = next((stop for stop in stops if stop in text), None)
            if hit is not None:
                self.scheduler.finish(seq, "stop", hit)
                stopped.append(seq)
        return stopped

    def _deliver(self, finished: list[Sequence]) -> list[RequestOutput]:
        """Outputs to return now. Captured rows are made for many requests together, as each time costs a pass over the
        last product's weights; so their outputs may have to wait for others.
        """
        outputs = self._hand_out(finished)
        ready = [output for output in outputs if not output.captured]
        if len(ready) < len(outputs):
            if not self._held:
                self._held_since = self.now()
            self._held += [output for output in outputs if output.captured]
        if self._held and (not self.scheduler.has_work() or self.now() - self._held_since > _LONGEST_HOLD_S):
            self._fill_captured(self._held)
            ready += self._held
            self._held = []
        return ready

    def _fill_captured(self, outputs: list[RequestOutput]) -> None:
        """Replace what the last product reads by the logits that it makes of it."""
        finals = [final for output in outputs for final in output.captured.values()]
        if finals:
            rows = iter(self.runner.backend.project(np.stack(finals)))
            for output in outputs:
                output.captured.update((index, next(rows)) for index in output.captured)

    def _hand_out(self, finished: list[Sequence]) -> list[RequestOutput]:
        """NOTE: what these requests hold here goes only once all outputs exist, so that `drop_running` finds them."""
        outputs = [self._output(seq) for seq in finished]
        for output in outputs:
            self.runner.forget(output.request_id)
            del self._progress[output.request_id]
        return outputs

    def _output(self, seq: Sequence) -> RequestOutput:
        request = seq.request
        progress = self._progress[request.request_id]
        token_ids = seq.output_token_ids
        text = self.tokenizer.decode(token_ids) if self.tokenizer is not None else ""
        cuts = [text.find(stop) for stop in request.params.stop if stop in text]
        seq.finished_s = self.now()
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            token_ids=token_ids,
            text=text[: min(cuts)] if cuts else text,
            finish_reason=seq.finish_reason or "abort",
            stop_reason=seq.stop_reason,
            logprobs=progress.logprobs if request.params.logprobs is not None else None,
            logits=np.stack(progress.logits) if progress.logits else None,
            captured=progress.captured,
            metrics=RequestMetrics(
                arrival_s=seq.arrival_s,
                scheduled_s=seq.scheduled_s,
                first_token_s=seq.first_token_s,
                finished_s=seq.finished_s,
            ),
            error=None,
        )
