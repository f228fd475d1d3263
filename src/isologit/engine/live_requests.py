"""What the live requests gather: tokens that a sampler chooses, text, log-probabilities, logits, rows to capture.

Owns one `Progress` for each. It does not know when a step runs, nor who is admitted to it.
"""

from __future__ import annotations

import numpy as np

from isologit.engine.captured_rows import Finals
from isologit.engine.output_text import OutputText
from isologit.engine.progress import Progress, StepDelta
from isologit.engine.request import RequestOutput, Sequence
from isologit.engine.runner import StepResult
from isologit.engine.sampler import Sampler
from isologit.engine.scheduler import ScheduledSequence, Scheduler, StepPlan
from isologit.text.tokenizer import Tokenizer


class LiveRequests:
    """From `add` to `take`, each by its id.

    raw_logits: log-probabilities are the logits as they are. streaming, keep_hidden: as in `EngineLoop`. deltas: of the
    last step that was filed, if streaming.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        *,
        seed: int,
        raw_logits: bool,
        streaming: bool,
        keep_hidden: bool,
    ) -> None:
        self.deltas: list[StepDelta] = []
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._seed = seed
        self._raw_logits = raw_logits
        self._streaming = streaming
        self._keep_hidden = keep_hidden
        self._num_added = 0
        self._progress: dict[str, Progress] = {}

    def add(self, seq: Sequence) -> None:
        """Take a request and queue it; nothing is kept of one that is refused. Raises RequestError."""
        params = seq.request.params
        seed = params.seed if params.seed is not None else [self._seed, self._num_added]
        self._num_added += 1
        stop_ids = [*self._scheduler.config.eos_token_ids, *params.stop_token_ids]
        # NOTE: bad words may be refused; nothing is kept of a request until nothing can be
        sampler = Sampler(params, np.random.default_rng(seed), stop_ids=stop_ids, tokenizer=self._tokenizer)
        text = None
        if self._tokenizer is not None:
            inner = seq.request.is_continued and any(map(self._tokenizer.is_text, seq.request.prompt_token_ids))
            text = OutputText(self._tokenizer, params, inner=inner)
        self._scheduler.add(seq)
        self._progress[seq.request.request_id] = Progress(seq, text, sampler)

    def choose(self, entry: ScheduledSequence, result: StepResult, row: int) -> list[int]:
        """The token after each of the sequence's rows that choose one, -1 where the logits are NaN."""
        tokens: list[int] = result.argmax[row : row + entry.num_logits].tolist()
        seq = entry.seq
        if entry.num_scored and result.argmax[row - entry.num_scored : row].min() < 0:
            self._scheduler.fail(seq, "the model's logits for a token of the prompt are NaN")
        if tokens and tokens[0] >= 0 and seq.needs_row:
            sampler = self._progress[seq.request.request_id].sampler
            tokens[0] = sampler.choose(result.logits(row), seq.token_ids, seq.num_prompt_tokens)
        return tokens

    def file(self, plan: StepPlan, result: StepResult, scheduled_s: float, committed_s: float) -> list[Sequence]:
        """Give each request what is its own of a committed step; returns those that a stop string ends."""
        self.deltas = []
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
                if text.stop is not None and self._scheduler.stop(entry, len(shown), text.stop):
                    stopped.append(seq)
            if seq.request.capture or params.return_logits or params.logprobs is not None:
                progress.gather(entry, result, row, raw_logits=self._raw_logits)
            if self._streaming:
                hidden = None
                if self._keep_hidden:
                    hidden = result.output.final[row : row + entry.num_accepted].copy()
                self.deltas.append(progress.delta(entry, shown, hidden))
        return stopped

    def take(self, finished: list[Sequence], now_s: float) -> list[tuple[RequestOutput, Finals]]:
        """Outputs of finished requests, and the rows to capture of each.

        NOTE: what these requests hold here goes only once all outputs exist, so that `drop_lost` finds them.
        """
        progresses = [self._progress[seq.request.request_id] for seq in finished]
        outputs = [(progress.output(now_s), progress.finals) for progress in progresses]
        for output, _ in outputs:
            del self._progress[output.request_id]
        return outputs

    def drop_lost(self) -> list[str]:
        """Forget the requests that the scheduler no longer knows and that were not taken; returns their ids."""
        lost = [request_id for request_id in self._progress if not self._scheduler.is_live(request_id)]
        for request_id in lost:
            del self._progress[request_id]
        return lost
