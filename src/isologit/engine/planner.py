"""How many slots and rows a step should have, and in which order requests should start. Only lengths are known here.

The planner replays the scheduler's rules on lengths alone, jumping from event to event (an admission, a prompt chunk,
an end) instead of from token to token, and takes the cheapest of a small grid of settings. Prefix reuse, early ends
and speculation are left out: they only make a run shorter.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

from isologit.errors import ConfigError

WorkloadItem = tuple[int, int]  # (num_prompt_tokens, max_tokens)

_SLOTS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_BUDGETS = (256, 512, 1024, 2048)
_NEAR_TIE = 1.01  # settings within one percent of the best count as equal; the smallest of them wins


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step with r rows: fixed_s + per_row_s * r, as measured from the smallest step to the largest.

    fixed_s holds what every step costs: reading the weights once, and the host's share.
    """

    fixed_s: float
    per_row_s: float

    def seconds(self, rows: int) -> float:
        """Seconds of one step with `rows` rows."""
        return self.fixed_s + self.per_row_s * rows


@dataclass(frozen=True)
class Plan:
    """Chosen settings; `order` holds indices of the requests, first to start first."""

    max_num_seqs: int
    max_num_batched_tokens: int
    order: list[int]
    predicted_steps: int
    predicted_seconds: float


def simulate(
    lengths: SequenceABC[WorkloadItem],
    order: SequenceABC[int],
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_blocks: int,
    block_size: int,
    cost: StepCost,
) -> tuple[int, float]:
    """(steps, seconds) the scheduler needs for these requests in this order, if each uses all its tokens.

    Raises ConfigError if a request never fits or a step cannot hold a row for every slot.
    """
    if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}), and "
            "both at least 1"
        )
    queue = [(lengths[i][0], lengths[i][1], -(-(sum(lengths[i]) - 1) // block_size)) for i in order]
    if max((blocks for _, _, blocks in queue), default=0) > num_blocks:
        raise ConfigError(f"a request needs more than the {num_blocks} key/value blocks there are")
    ends: list[tuple[int, int]] = []  # heap of (step after which it is over, its blocks)
    free, step, seconds, head = num_blocks, 0, 0.0, 0
    chunk_left, chunk_item = 0, (0, 0)  # the one prompt that is only partly fed: rows left, (max_tokens, blocks)
    while head < len(queue) or ends or chunk_left:
        rows = len(ends)
        if chunk_left:
            fed = min(chunk_left, max_num_batched_tokens - rows)
            rows += fed
            chunk_left -= fed
            if not chunk_left:
                heapq.heappush(ends, (step + chunk_item[0], chunk_item[1]))
        while head < len(queue) and not chunk_left and rows < max_num_batched_tokens and len(ends) < max_num_seqs:
            prompt, max_tokens, blocks = queue[head]
            if blocks > free:
                break
            free -= blocks
            head += 1
            fed = min(prompt, max_num_batched_tokens - rows)
            rows += fed
            if fed < prompt:
                chunk_left, chunk_item = prompt - fed, (max_tokens, blocks)
            else:
                heapq.heappush(ends, (step + max_tokens, blocks))
        seconds += cost.seconds(rows)
        step += 1
        # NOTE: until a sequence ends, every further step has one row for each and nothing else, unless a prompt is
        # partly fed or the queue was held up by rows alone.
        if not chunk_left and ends:
            held_up = head == len(queue) or len(ends) >= max_num_seqs or queue[head][2] > free
            quiet = ends[0][0] - step if held_up else 0
            if quiet > 0:
                seconds += quiet * cost.seconds(len(ends))
                step += quiet
        while ends and ends[0][0] <= step:
            free += heapq.heappop(ends)[1]
    return step, seconds


def plan(
    lengths: SequenceABC[WorkloadItem],
    *,
    num_blocks: int,
    block_size: int,
    cost: StepCost,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    longest_first: bool = True,
) -> Plan:
    """The cheapest settings for a workload; a given `max_num_seqs` or `max_num_batched_tokens` is kept.

    Longest first is the greedy rule of Graham (1969) for independent jobs: what takes most steps must not start last.
    Raises ConfigError as `simulate` does.
    """
    order = list(range(len(lengths)))
    if longest_first:
        order.sort(key=lambda i: (-lengths[i][1], -lengths[i][0]))
    budget = max_num_batched_tokens
    slots = _slot_choices(len(lengths), budget) if max_num_seqs is None else [max_num_seqs]
    settings = [(count, rows) for count in slots for rows in (_budget_choices(count) if budget is None else [budget])]
    good_enough = _least_seconds(lengths, cost) * _NEAR_TIE
    candidates: list[tuple[int, int, int, float]] = []
    for count, rows in settings:
        steps, seconds = simulate(lengths, order, count, rows, num_blocks, block_size, cost)
        if seconds <= good_enough:
            return Plan(count, rows, order, steps, seconds)  # larger settings can only tie
        candidates.append((count, rows, steps, seconds))
    limit = min(seconds for _, _, _, seconds in candidates) * _NEAR_TIE
    count, rows, steps, seconds = min(candidate for candidate in candidates if candidate[3] <= limit)
    return Plan(count, rows, order, steps, seconds)


def _least_seconds(lengths: SequenceABC[WorkloadItem], cost: StepCost) -> float:
    """No schedule is faster: the longest output takes a step per token, and every row is computed once."""
    steps = max((max_tokens for _, max_tokens in lengths), default=0)
    rows = sum(prompt + max_tokens - 1 for prompt, max_tokens in lengths)
    return cost.fixed_s * steps + cost.per_row_s * rows


def _slot_choices(num_requests: int, budget: int | None) -> list[int]:
    most = max(1, num_requests if budget is None else min(num_requests, budget))
    choices = [count for count in _SLOTS if count < most]
    return [*choices, most] if most <= _SLOTS[-1] else choices


def _budget_choices(slots: int) -> list[int]:
    """Row limits to try."""
    return sorted({max(slots, rows) for rows in _BUDGETS})
