"""Speculative decoding with a smaller model (Leviathan et al. 2023): it drafts, the large one verifies.

Owns the draft model's steps and how far its keys and values reach. It has no blocks of its own: both models keep a
token's keys and values in the same slot of the same block, each in its own memory.
"""

from __future__ import annotations

from isologit.backends.base import Backend
from isologit.engine.request import Sequence
from isologit.engine.runner import Runner
from isologit.engine.scheduler import ScheduledSequence, StepPlan
from isologit.engine.speculation import DraftLengths, RowCost


class DraftModelProposer:
    """Drafts are what the draft model would greedily generate.

    model: shares the vocabulary and the block size of the model it drafts for, and has memory for as many blocks.
    row_cost: of one more draft token, the draft model's own step included. max_rows: tokens of one step of the draft
    model. Raises ConfigError for a `max_draft` below 1.
    """

    def __init__(self, model: Backend, row_cost: RowCost, *, max_rows: int, max_draft: int) -> None:
        self._runner = Runner(model)
        self._row_cost = row_cost
        self._max_rows = max_rows
        self._lengths = DraftLengths(max_draft)
        self._num_computed: dict[str, int] = {}  # leading tokens whose keys and values the draft model holds

    def is_worthwhile(self, num_sequences: int) -> bool:
        """Whether one more row, and the draft model's, cost less than a token does now."""
        return self._row_cost(num_sequences) < 1.0

    def propose(self, wanted: list[tuple[Sequence, int]], budget: int) -> list[list[int]]:
        """Drafts by as many steps of the draft model as the longest has tokens, after catching up with each."""
        drafts: list[list[int]] = [[] for _ in wanted]
        cost = self._row_cost(len(wanted))
        if cost >= 1.0:
            return drafts
        active: list[tuple[Sequence, list[int], int]] = []  # sequence, its draft, how many tokens it should have
        for (seq, limit), draft in zip(wanted, drafts, strict=True):
            limit = min(limit, budget)
            if limit >= 1 and self._lengths.is_due(seq):
                length = min(limit, self._lengths.choose(seq, cost))
                active.append((seq, draft, length))
                budget -= length
        self._catch_up(active)
        count = 1  # NOTE: drafts that have fewer by now ended early
        while active := [entry for entry in active if len(entry[1]) == count < entry[2]]:
            rows = [ScheduledSequence(s, len(s.token_ids) + count - 1, 1, d[-1:], 1) for s, d, _ in active]
            self._extend(rows, [draft for _, draft, _ in active])
            count += 1
        return drafts

    def observe(self, seq: Sequence, proposed: int, accepted: int) -> None:
        """Learn from a verification; keys and values of accepted tokens stay; all but the last were computed."""
        self._lengths.observe(seq, proposed, accepted)
        self._num_computed[seq.request.request_id] += min(accepted, proposed - 1)

    def forget(self, seq: Sequence) -> None:
        """Drop what is known of a finished sequence."""
        self._lengths.forget(seq)
        self._num_computed.pop(seq.request.request_id, None)
        self._runner.forget(seq.request.request_id)

    def _catch_up(self, active: list[tuple[Sequence, list[int], int]]) -> None:
        """Feed what the draft model has not seen, which gives each sequence its first draft token."""
        rows: list[ScheduledSequence] = []
        drafts: list[list[int]] = []
        free = self._max_rows
        for seq, draft, _ in active:
            start, known = self._num_computed.get(seq.request.request_id, 0), len(seq.token_ids)
            while start < known:
                count = min(known - start, free)
                rows.append(ScheduledSequence(seq, start, count, [], int(start + count == known)))
                drafts.append(draft)
                start += count
                free -= count
                if free == 0:
                    self._extend(rows, drafts)
                    rows, drafts, free = [], [], self._max_rows
            self._num_computed[seq.request.request_id] = known
        if rows:
            self._extend(rows, drafts)

    def _extend(self, rows: list[ScheduledSequence], drafts: list[list[int]]) -> None:
        """One step of the draft model; a token it cannot choose (NaN) ends that sequence's draft."""
        result = self._runner.execute(StepPlan(rows, sum(row.num_tokens for row in rows)))
        for row, first, draft in zip(rows, result.first_rows, drafts, strict=True):
            if row.num_logits and result.argmax[first] >= 0:
                draft.append(int(result.argmax[first]))
