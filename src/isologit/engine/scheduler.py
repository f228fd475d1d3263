"""Who runs in the next step, and what came of it. Plain ints and lists; knows nothing of tensors, text or time.

Every sequence is admitted with all the blocks it can ever need, so nothing that runs is ever pushed out again. The
queue (`waiting_queue`) says who is next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from isologit.engine.blocks import BlockPool
from isologit.engine.request import Sequence, SequenceStatus
from isologit.engine.request_limits import RequestLimits
from isologit.engine.speculation import Proposer
from isologit.engine.waiting_queue import WaitingQueue
from isologit.errors import ConfigError, RequestError

_NAN = -1  # among chosen tokens: the row's logits are NaN
_MOST_SCORED_ROWS = 256  # of a step: the logits of each are kept whole until its log-probabilities are taken


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step, validated when built (ConfigError)."""

    max_num_seqs: int  # running slots
    max_num_batched_tokens: int  # rows of one step
    eos_token_ids: tuple[int, ...]
    max_model_len: int  # prompt and output tokens of one request
    vocab_size: int | None = None
    longest_first: bool = False  # the order of the queue; else as requests come

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running request needs one token a step"
            )


@dataclass(slots=True)
class ScheduledSequence:
    """A sequence's part of a step: `num_tokens` rows from position `start` on, the drafts last.

    Fed are `seq.token_ids[start : start + num_tokens - len(draft_token_ids)] + draft_token_ids`. `num_logits` counts
    the last rows whose logits choose tokens: 0 if the chunk ends before the known tokens do, else 1 + number of drafts.
    `num_scored` counts the rows before them whose logits say how likely the prompt's next tokens are: all others, if
    that is wanted, else 0. `num_accepted` is set by `commit`: tokens the sequence gained.
    """

    seq: Sequence
    start: int
    num_tokens: int
    draft_token_ids: list[int]
    num_logits: int
    num_scored: int = 0
    num_accepted: int = 0


@dataclass(slots=True)
class StepPlan:
    """One step: which sequences feed which tokens, and how many rows that makes."""

    sequences: list[ScheduledSequence]
    num_tokens: int


class Scheduler:
    """Queue, running sequences, and the rules by which tokens are fed and accepted."""

    def __init__(self, config: SchedulerConfig, blocks: BlockPool, proposer: Proposer | None = None) -> None:
        self.config = config
        self.blocks = blocks
        self.proposer = proposer
        kv_tokens = blocks.num_blocks * blocks.block_size
        self.limits = RequestLimits(config.max_model_len, kv_tokens, config.vocab_size)
        self._waiting = WaitingQueue(longest_first=config.longest_first)
        self._running: dict[str, Sequence] = {}
        self._live: dict[str, Sequence] = {}  # waiting, running, or finished and not yet handed out
        self._unreported: list[Sequence] = []  # finished without a step
        self._is_ahead = False  # within `as_if_committed`

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    def has_work(self) -> bool:
        """Whether another `schedule` has anything to do."""
        return bool(self._running or self._waiting or self._unreported)

    def is_live(self, request_id: str) -> bool:
        """Whether a request waits or runs, or finished without a step and was not handed out yet."""
        return request_id in self._live

    def add(self, seq: Sequence) -> None:
        """Put a sequence into the queue. Raises RequestError if it can never run or its id is in use."""
        request = seq.request
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id} is in use; ids must be unique")
        self.limits.check(request.prompt_token_ids, request.params, request.replay_token_ids)
        if seq.forced_tokens is None:
            eos = () if request.params.ignore_eos else self.config.eos_token_ids
            seq.stop_ids = frozenset([*eos, *request.params.stop_token_ids])
        self._live[request.request_id] = seq
        self._waiting.push(seq)

    def abort(self, request_id: str) -> Sequence | None:
        """End a waiting or running sequence with reason "abort" and return it; None if there is none."""
        seq = self._live.get(request_id)
        if seq is None or seq.status is SequenceStatus.FINISHED:
            return None
        if seq.status is SequenceStatus.WAITING:
            self._waiting.left()
        self.finish(seq, "abort")
        return seq

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence; its slot and blocks are free at once."""
        request_id = seq.request.request_id
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        del self._live[request_id]
        if self._running.pop(request_id, None) is not None:
            self.blocks.release(seq.block_ids)
            seq.block_ids = []
            if self.proposer is not None:
                self.proposer.forget(seq)

    def stop(self, entry: ScheduledSequence, num_kept: int, stop: str) -> bool:
        """End a sequence at a stop string, after `num_kept` of the tokens it gained in the step just committed.

        Returns whether it was running, False if `commit` has returned it as finished.
        """
        seq = entry.seq
        del seq.token_ids[len(seq.token_ids) - entry.num_accepted + num_kept :]
        entry.num_accepted = num_kept
        if seq.status is SequenceStatus.RUNNING:
            self.finish(seq, "stop", stop)
            return True
        seq.finish_reason, seq.stop_reason, seq.error = "stop", stop, None
        return False

    def fail(self, seq: Sequence, message: str) -> None:
        """End a sequence of the step that runs, whose keys and values cannot be trusted; `commit` returns it."""
        seq.error = message
        self.blocks.forget(seq.block_ids)
        self.finish(seq, "error")
        self._unreported.append(seq)

    def drop_running(self) -> list[Sequence]:
        """End every running sequence with reason "error", as after a step that was not completed.

        Cached prefixes stay: a block is registered only once the step that computed it was committed.
        """
        dropped = list(self._running.values())
        for seq in dropped:
            self.finish(seq, "error")
        return dropped

    def take_finished(self) -> list[Sequence]:
        """Sequences that finished without a step (an empty replay) and that no `commit` has returned yet."""
        finished, self._unreported = self._unreported, []
        return finished

    # -- before a step --------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing is left to compute.

        First one row (and its drafts) for every sequence that generates, then further prompt chunks of admitted
        sequences, then new sequences from the queue while slots, rows and blocks last. Within `as_if_committed` no
        drafts, and no new sequences that need logits.
        """
        scheduled: list[ScheduledSequence] = []
        prefilling: list[Sequence] = []
        for seq in self._running.values():
            start = seq.num_computed_tokens
            if start + 1 == len(seq.token_ids):
                scheduled.append(ScheduledSequence(seq, start, 1, [], 1))
            else:
                prefilling.append(seq)
        budget = self.config.max_num_batched_tokens - len(scheduled)
        if self.proposer is not None and not self._is_ahead:
            # NOTE: a row is kept for each unfinished prompt, so drafts cannot bring prefill to a halt.
            budget -= self._add_drafts(self.proposer, scheduled, budget - len(prefilling))
        scored_budget = _MOST_SCORED_ROWS
        for seq in prefilling:
            rows = _add_chunk(scheduled, seq, min(budget, scored_budget) if seq.scores_prompt else budget)
            budget -= rows
            scored_budget -= rows if seq.scores_prompt else 0
        while budget > 0 and len(self._running) < self.config.max_num_seqs:
            first = self._waiting.head()
            if first is None or (self._is_ahead and first.needs_logits):
                break
            if first.num_to_compute == 0 or not (first.generates or first.scores_prompt):
                self._waiting.pop()
                self.finish(first, "length")
                self._unreported.append(first)
                continue
            if not self._admit(first):
                break
            rows = _add_chunk(scheduled, first, min(budget, scored_budget) if first.scores_prompt else budget)
            budget -= rows
            scored_budget -= rows if first.scores_prompt else 0
        if not scheduled:
            if (self._waiting or self._running) and not self._is_ahead:
                raise AssertionError("work is left but nothing can be scheduled")
            return None
        return StepPlan(scheduled, self.config.max_num_batched_tokens - budget)

    def foresees(self, plan: StepPlan) -> bool:
        """Whether the step after `plan` can be scheduled before `plan` is committed.

        Every sequence must go on by the argmax of its row, which the device knows without the host, and nothing may
        depend on which token that is, as a draft does. A request that needs logits and could have a slot is waited for.
        """
        if self.proposer is not None and self.proposer.is_worthwhile(len(self._running)):
            return False
        if any(seq.needs_logits for seq in self._running.values()):
            return False
        if any(entry.draft_token_ids for entry in plan.sequences):
            return False
        first = self._waiting.head() if len(self._running) < self.config.max_num_seqs else None
        return first is None or not first.needs_logits

    @contextmanager
    def as_if_committed(self, plan: StepPlan, first_rows: list[int]) -> Iterator[None]:
        """Within the block sequences stand as if `plan`, which runs and is foreseen, were committed.

        first_rows: as in `StepResult`. A token that is not known yet is -1 - r, chosen by row r of the step that runs.
        Sequences that reach their length are out; their blocks are not free before `commit`.
        """
        rows = zip(plan.sequences, first_rows, strict=True)
        going = [(entry, row) for entry, row in rows if entry.seq.status is SequenceStatus.RUNNING]
        ending: list[Sequence] = []
        for entry, row in going:
            seq = entry.seq
            seq.num_computed_tokens += entry.num_tokens
            if entry.num_logits:
                forced = seq.forced_tokens
                seq.token_ids.append(-1 - row if forced is None else forced[seq.num_output_tokens])
                if len(seq.token_ids) == seq.max_total_tokens:
                    del self._running[seq.request.request_id]
                    ending.append(seq)
        self._is_ahead = True
        try:
            yield
        finally:
            self._is_ahead = False
            self._running.update((seq.request.request_id, seq) for seq in ending)
            for entry, _ in going:
                entry.seq.num_computed_tokens -= entry.num_tokens
                if entry.num_logits:
                    entry.seq.token_ids.pop()

    def _add_drafts(self, proposer: Proposer, scheduled: list[ScheduledSequence], budget: int) -> int:
        """Extend decode rows by drafts; returns the rows that took."""
        if budget < 1:
            return 0
        wanted = []
        for entry in scheduled:
            seq = entry.seq
            known = len(seq.token_ids)
            wanted.append((seq, seq.max_total_tokens - known - 1 if known >= seq.argmax_from else 0))
        num_drafts = 0
        for entry, drafts in zip(scheduled, proposer.propose(wanted, budget), strict=True):
            if drafts:
                entry.draft_token_ids = drafts
                entry.num_tokens = entry.num_logits = 1 + len(drafts)
                num_drafts += len(drafts)
        return num_drafts

    def _num_blocks_of(self, seq: Sequence) -> int:
        # The last output token is never fed, so its keys and values need no room.
        return -(-(seq.max_total_tokens - 1) // self.blocks.block_size)

    def _admit(self, seq: Sequence) -> bool:
        """Give the head of the queue a slot and all its blocks; False, changing nothing, if they do not suffice."""
        blocks, needed = self.blocks, self._num_blocks_of(seq)
        if needed - (seq.num_prompt_tokens - 1) // blocks.block_size > blocks.num_free:
            return False
        shared = [] if seq.scores_prompt else blocks.match_prefix(seq.token_ids)
        if not blocks.can_allocate(needed - len(shared), shared):
            return False
        self._waiting.pop()
        blocks.acquire(shared)
        seq.block_ids = shared + blocks.allocate(needed - len(shared))
        seq.num_registered_blocks = len(shared)
        seq.num_cached_tokens = seq.num_computed_tokens = len(shared) * blocks.block_size
        seq.status = SequenceStatus.RUNNING
        self._running[seq.request.request_id] = seq
        return True

    # -- after a step ---------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, chosen: list[list[int]]) -> list[Sequence]:
        """Take over a step's result; returns the sequences that are finished.

        `chosen[i]` holds the token chosen after each of the `num_logits` rows of `plan.sequences[i]`, -1 where the row
        is NaN: a sequence that would gain it ends with reason "error". Recorded tokens replace them in a replay. Drafts
        are accepted as far as they agree, and the first choice after them comes on top. Sequences that ended since
        `schedule` are passed over.
        """
        finished = self.take_finished()
        caching, block_size = self.blocks.enable_prefix_caching, self.blocks.block_size
        running = SequenceStatus.RUNNING
        for entry, tokens in zip(plan.sequences, chosen, strict=True):
            seq = entry.seq
            if len(tokens) != entry.num_logits:
                raise AssertionError(f"{len(tokens)} chosen tokens for {entry.num_logits} rows of logits")
            if seq.status is not running:
                continue
            if tokens:
                if seq.forced_tokens is not None:
                    begin = seq.num_output_tokens
                    recorded = seq.forced_tokens[begin : begin + entry.num_logits]
                    tokens = [_NAN if token == _NAN else said for token, said in zip(tokens, recorded, strict=False)]
                if entry.draft_token_ids:
                    tokens = self._verify(entry, tokens)
                known = seq.token_ids
                token = tokens[0]
                is_open = len(known) + 1 < seq.max_total_tokens
                if is_open and len(tokens) == 1 and token >= 0 and token not in seq.stop_ids:
                    known.append(token)  # nearly every row of nearly every step
                    entry.num_accepted = 1
                elif self._append(entry, tokens):
                    finished.append(seq)
                computed = len(known) - 1
            else:
                computed = entry.start + entry.num_tokens
                if not seq.generates and computed == seq.num_to_compute:
                    seq.finish_reason = "length"
                    finished.append(seq)
            seq.num_computed_tokens = computed
            if caching and computed >= (seq.num_registered_blocks + 1) * block_size:
                self._register_full_blocks(seq)
        for seq in finished:
            if seq.status is running:
                if seq.error is not None:
                    self.blocks.forget(seq.block_ids)
                self.finish(seq, seq.finish_reason or "length", seq.stop_reason)
        return finished

    def _verify(self, entry: ScheduledSequence, tokens: list[int]) -> list[int]:
        """The chosen tokens whose rows were fed with right drafts only."""
        accepted = 0
        for draft, token in zip(entry.draft_token_ids, tokens, strict=False):
            if draft != token:
                break
            accepted += 1
        if self.proposer is not None:
            self.proposer.observe(entry.seq, len(entry.draft_token_ids), accepted)
        return tokens[: accepted + 1]

    def _append(self, entry: ScheduledSequence, tokens: list[int]) -> bool:
        """Append tokens up to one that ends the sequence; returns whether it ended, and notes why."""
        seq = entry.seq
        known = seq.token_ids
        before = len(known)
        for token in tokens:
            if token == _NAN:
                seq.finish_reason = "error"
                seq.error = f"the model's logits for output token {seq.num_output_tokens + 1} are NaN"
                break
            known.append(token)
            if token in seq.stop_ids:
                params = seq.request.params
                if len(known) - seq.num_prompt_tokens > params.min_tokens:
                    is_eos = token in self.config.eos_token_ids and not params.ignore_eos
                    seq.finish_reason, seq.stop_reason = "stop", None if is_eos else token
                    break
        entry.num_accepted = len(known) - before
        if seq.finish_reason is None and len(known) >= seq.max_total_tokens:
            recorded = seq.forced_tokens
            complete = recorded is not None and seq.max_total_tokens == seq.num_prompt_tokens + len(recorded)
            seq.finish_reason = "stop" if complete and known[-1] in self.config.eos_token_ids else "length"
        return seq.finish_reason is not None

    def _register_full_blocks(self, seq: Sequence) -> None:
        size = self.blocks.block_size
        for i in range(seq.num_registered_blocks, seq.num_computed_tokens // size):
            parent = seq.block_ids[i - 1] if i else None
            self.blocks.register(seq.block_ids[i], parent, seq.token_ids[i * size : (i + 1) * size])
            seq.num_registered_blocks = i + 1

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, blocks and counters of all sequences add up, as they do after `commit`."""
        self.blocks.check_integrity([seq.block_ids for seq in self._running.values()])
        if len(self._running) > self.config.max_num_seqs:
            raise AssertionError(f"{len(self._running)} sequences run in {self.config.max_num_seqs} slots")
        listed = [seq.request.request_id for seq in self._waiting] + list(self._running)
        if sorted(listed) != sorted(self._live):
            raise AssertionError("a live sequence is neither waiting nor running, or both")
        for seq in self._running.values():
            name = f"request {seq.request.request_id}"
            if len(seq.block_ids) != self._num_blocks_of(seq):
                raise AssertionError(f"{name} holds {len(seq.block_ids)} blocks instead of {self._num_blocks_of(seq)}")
            known = len(seq.token_ids)
            is_open = known < seq.max_total_tokens or not seq.generates
            if not (is_open and seq.num_cached_tokens <= seq.num_computed_tokens < known):
                raise AssertionError(f"{name}: {seq.num_computed_tokens} of {len(seq.token_ids)} tokens computed")


def _add_chunk(scheduled: list[ScheduledSequence], seq: Sequence, budget: int) -> int:
    """Feed as much of the known tokens as the budget allows; returns the rows that took."""
    start = seq.num_computed_tokens
    missing = seq.num_to_compute - start
    count = min(missing, budget)
    if count > 0:
        num_logits = int(count == missing and seq.generates)
        num_scored = count - num_logits if seq.scores_prompt else 0
        scheduled.append(ScheduledSequence(seq, start, count, [], num_logits, num_scored))
    return count
