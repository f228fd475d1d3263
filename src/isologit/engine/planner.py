"""How many slots and rows a step should have, and in which order requests should start. Only lengths are known here.

The planner replays the scheduler's rules on lengths alone, jumping from event to event (an admission, a prompt chunk,
an end) instead of from token to token, and takes the cheapest of a small grid of settings. Prefix reuse, early ends
and speculation are left out: they only make a run shorter.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from itertools import combinations
from math import inf

from isologit.errors import ConfigError

WorkloadItem = tuple[int, int]  # (num_prompt_tokens, max_tokens)

_SLOTS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_BUDGETS = (256, 512, 1024, 2048)
_NEAR_TIE = 1.01  # settings within one percent of the best count as equal; the smallest of them wins


@dataclass(frozen=True)
class StepCost:
    """What a step takes, in seconds, as a sum of what is in it.

    rows, seconds: steps of so many rows without attention and LM head, both ascending; a straight line between two of
    them and to the left of the first two, `per_row_s` for each row beyond the last. They hold what every step costs,
    too: reading the weights once, and the host's share.
    per_logits_row_s: a row whose token is chosen. per_context_token_s: a token before a decoding row, or the row
    itself. per_prompt_pair_s: a row of a prompt with a token before it, or with itself.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    per_row_s: float
    per_logits_row_s: float = 0.0
    per_context_token_s: float = 0.0
    per_prompt_pair_s: float = 0.0

    def rows_s(self, rows: int) -> float:
        """Seconds of the part that depends on the number of rows alone."""
        if rows >= self.rows[-1]:
            return self.seconds[-1] + self.per_row_s * (rows - self.rows[-1])
        after = max(1, bisect_right(self.rows, rows))
        (left, right), (least, most) = self.rows[after - 1 : after + 1], self.seconds[after - 1 : after + 1]
        return least + (most - least) / (right - left) * (rows - left)

    def step_s(self, rows: int, logits_rows: int, context_tokens: int, prompt_pairs: int) -> float:
        """Seconds of a step with so much of each."""
        return (
            self.rows_s(rows)
            + self.per_logits_row_s * logits_rows
            + self.per_context_token_s * context_tokens
            + self.per_prompt_pair_s * prompt_pairs
        )

    def intercept_s(self, per_row_s: float) -> float:
        """The largest a for which no step takes less than a + per_row_s * rows; minus infinity if there is none."""
        if per_row_s > self.per_row_s:
            return -inf
        return min(seconds - per_row_s * rows for rows, seconds in zip(self.rows, self.seconds, strict=True))


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
    ends: list[tuple[int, int, int]] = []  # heap of (step after which it is over, its blocks, its tokens by then)
    free, step, seconds, head = num_blocks, 0, 0.0, 0
    context = 0  # tokens that the rows of decoding sequences see in this step, themselves included
    chunk_left, chunk_item = 0, (0, 0, 0)  # the one prompt that is only partly fed: rows left, the rest as in `queue`
    while head < len(queue) or ends or chunk_left:
        rows = decoding = len(ends)
        pairs = fresh = 0  # of prompts; `fresh`: what the sequences that start now see in the next step
        if chunk_left:
            fed = min(chunk_left, max_num_batched_tokens - rows)
            rows += fed
            prompt, max_tokens, blocks = chunk_item
            pairs += _pairs(prompt - chunk_left, fed)
            chunk_left -= fed
            if not chunk_left:
                heapq.heappush(ends, (step + max_tokens, blocks, prompt + max_tokens))
                fresh += prompt + 1
        while head < len(queue) and not chunk_left and rows < max_num_batched_tokens and len(ends) < max_num_seqs:
            prompt, max_tokens, blocks = queue[head]
            if blocks > free:
                break
            free -= blocks
            head += 1
            fed = min(prompt, max_num_batched_tokens - rows)
            rows += fed
            pairs += _pairs(0, fed)
            if fed < prompt:
                chunk_left, chunk_item = prompt - fed, queue[head - 1]
            else:
                heapq.heappush(ends, (step + max_tokens, blocks, prompt + max_tokens))
                fresh += prompt + 1
        seconds += cost.step_s(rows, len(ends), context, pairs)
        step += 1
        context += decoding + fresh
        # NOTE: until a sequence ends, every further step has one row for each and nothing else, unless a prompt is
        # partly fed or the queue was held up by rows alone.
        if not chunk_left and ends:
            running = len(ends)
            held_up = head == len(queue) or running >= max_num_seqs or queue[head][2] > free
            quiet = ends[0][0] - step if held_up else 0
            if quiet > 0:
                # Each of these steps sees `running` tokens more than the one before.
                seconds += quiet * cost.step_s(running, running, context, 0)
                seconds += cost.per_context_token_s * running * (quiet * (quiet - 1) // 2)
                step += quiet
                context += quiet * running
        while ends and ends[0][0] <= step:
            _, blocks, tokens = heapq.heappop(ends)
            free += blocks
            context -= tokens
    return step, seconds


def _pairs(before: int, rows: int) -> int:
    """(row, token that it sees) of `rows` rows of a prompt that follow `before` tokens."""
    return rows * before + rows * (rows + 1) // 2


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
    """No schedule is faster: the longest output takes a step per token, and every row is computed once.

    A line below the seconds of all steps, a + b * rows, gives a bound, since only the number of steps depends on the
    schedule: a * (fewest steps) + b * (all rows). Of the lines through two measured sizes the best is taken.
    """
    steps = max((max_tokens for _, max_tokens in lengths), default=0)
    rows = sum(prompt + max_tokens - 1 for prompt, max_tokens in lengths)
    sizes = list(zip(cost.rows, cost.seconds, strict=True))
    slopes = [0.0, cost.per_row_s, *((s1 - s0) / (r1 - r0) for (r0, s0), (r1, s1) in combinations(sizes, 2))]
    lines = [(fixed, slope) for slope in slopes if (fixed := cost.intercept_s(slope)) >= 0]
    return (
        max((fixed * steps + slope * rows for fixed, slope in lines), default=0.0)
        + cost.per_logits_row_s * sum(max_tokens for _, max_tokens in lengths)
        + cost.per_context_token_s * sum((n - 1) * prompt + n * (n - 1) // 2 for prompt, n in lengths)
        + cost.per_prompt_pair_s * sum(_pairs(0, prompt) for prompt, _ in lengths)
    )


def _slot_choices(num_requests: int, budget: int | None) -> list[int]:
    most = max(1, num_requests if budget is None else min(num_requests, budget))
    choices = [count for count in _SLOTS if count < most]
    return [*choices, most] if most <= _SLOTS[-1] else choices


def _budget_choices(slots: int) -> list[int]:
    """Row limits to try."""
    return sorted({max(slots, rows) for rows in _BUDGETS})
