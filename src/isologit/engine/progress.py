"""What a request gathers while it runs, besides its tokens: text, log-probabilities, logits and rows to capture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isologit.engine.captured_rows import LAST_TOKEN, Finals
from isologit.engine.output_text import OutputText
from isologit.engine.request import RequestMetrics, RequestOutput, Sequence
from isologit.engine.runner import StepResult
from isologit.engine.sampler import Sampler, top_logprobs
from isologit.engine.scheduler import ScheduledSequence


@dataclass(frozen=True, slots=True)
class StepDelta:
    """A request's new tokens of one step, one entry each; `logprobs` is empty if it wants none.

    texts: what the token made certain. shown: what may be shown since, which lacks what may begin a stop string.
    hidden: float32 [n, hidden], what the LM head read for each; None where the loop was not asked to keep it.
    """

    request_id: str
    token_ids: list[int]
    texts: list[str]
    shown: list[str]
    logprobs: list[dict[int, float]]
    hidden: np.ndarray | None = None


class Progress:
    """Of one request. `text` is None without a tokenizer."""

    def __init__(self, seq: Sequence, text: OutputText | None, sampler: Sampler) -> None:
        self.seq = seq
        self.text = text
        self.sampler = sampler
        self.finals: Finals = {}
        self.logprobs: list[dict[int, float]] = []
        self.prompt_logprobs: list[dict[int, float] | None] = [None]  # nothing predicts the first
        self._logits: list[np.ndarray] = []
        self._whole_text: str | None = None

    def read(self, token_ids: list[int]) -> list[str]:
        """Make text of new tokens, up to one that completes a stop string; returns what each lets be shown."""
        text = self.text
        assert text is not None
        shown: list[str] = []
        for token_id in token_ids:
            is_complete = text.push(token_id)
            shown.append(text.show())
            if is_complete:
                break
        if text.stop is not None or self.seq.finish_reason is not None:
            self._end_text()
            shown[-1] += text.show()
        return shown

    def _end_text(self) -> str:
        if self._whole_text is None:
            text, seq = self.text, self.seq
            by_stop_token = seq.finish_reason == "stop"
            self._whole_text = "" if text is None else text.finish(seq.output_token_ids, by_stop_token=by_stop_token)
        return self._whole_text

    def score_prompt(self, entry: ScheduledSequence, result: StepResult, row: int, *, raw_logits: bool) -> None:
        """Keep how likely the prompt's tokens after those of a chunk are; `row` is the first that chooses a token."""
        seq = self.seq
        count = seq.request.params.prompt_logprobs
        assert count is not None
        for i in range(entry.num_scored):
            scored_row = row - entry.num_scored + i
            normaliser = 0.0 if raw_logits else result.log_normaliser(scored_row)
            token = seq.token_ids[entry.start + i + 1]
            self.prompt_logprobs.append(top_logprobs(result.logits(scored_row), token, count, normaliser))

    def gather(self, entry: ScheduledSequence, result: StepResult, row: int, *, raw_logits: bool) -> None:
        """Keep what the request asked for of the tokens it gained; `row` is its first logits row of the step."""
        seq, request = self.seq, self.seq.request
        params, final = request.params, result.output.final
        first_index = seq.num_output_tokens - entry.num_accepted
        for i in range(entry.num_accepted):
            index = first_index + i
            if index in request.capture:
                self.finals[index] = final[row + i].copy()
            if params.return_logits:
                self._logits.append(result.logits(row + i).copy())
            if params.logprobs is not None:
                token = seq.token_ids[seq.num_prompt_tokens + index]
                normaliser = 0.0 if raw_logits else result.log_normaliser(row + i)
                self.logprobs.append(top_logprobs(result.logits(row + i), token, params.logprobs, normaliser))
        if LAST_TOKEN in request.capture and seq.finish_reason is not None:
            self.finals[seq.num_output_tokens - 1] = final[row + entry.num_accepted - 1].copy()

    def delta(self, entry: ScheduledSequence, shown: list[str], hidden: np.ndarray | None) -> StepDelta:
        """NOTE: the text of the last token is complete only now: the end of a request adds what was uncertain."""
        count = entry.num_accepted
        return StepDelta(
            self.seq.request.request_id,
            self.seq.token_ids[-count:],
            [""] * count if self.text is None else self.text.token_texts[-count:],
            shown or [""] * count,
            self.logprobs[-count:],
            hidden,
        )

    def output(self, finished_s: float) -> RequestOutput:
        """The result of a finished request; its captured rows come later."""
        seq, request = self.seq, self.seq.request
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            token_ids=seq.output_token_ids,
            text=self._end_text(),
            finish_reason=seq.finish_reason or "abort",
            stop_reason=seq.stop_reason,
            logprobs=self.logprobs if request.params.logprobs is not None else None,
            logits=np.stack(self._logits) if self._logits else None,
            captured={},
            metrics=RequestMetrics(
                arrival_s=seq.arrival_s,
                scheduled_s=seq.scheduled_s,
                first_token_s=seq.first_token_s,
                finished_s=finished_s,
            ),
            error=seq.error,
            prompt_logprobs=self.prompt_logprobs if seq.scores_prompt else None,
        )
