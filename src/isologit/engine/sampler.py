"""Choosing a token from a row of logits when the request wants more than the argmax the step already computed."""

from __future__ import annotations

import math

import numpy as np

from isologit.engine.request import SamplingParams


def log_softmax(row: np.ndarray) -> np.ndarray:
    """float64 [vocab] log-probabilities of one float32 [vocab] logits row."""
    wide = row.astype(np.float64)
    wide -= wide.max()
    normalised: np.ndarray = wide - np.log(np.exp(wide).sum())
    return normalised


def top_logprobs(row: np.ndarray, token_id: int, count: int, *, raw_logits: bool = False) -> dict[int, float]:
    """Log-probability, or the logit itself, of `token_id` and of the `count` most likely tokens, by token id."""
    if count == 0 and raw_logits:
        return {token_id: float(row[token_id])}
    if count == 0:  # NOTE: servers ask this of every row, so no second pass over the row beyond the sum
        top = row.max()
        return {token_id: float(row[token_id] - top) - math.log(float(np.exp(row - top).sum(dtype=np.float64)))}
    values = row if raw_logits else log_softmax(row)
    wanted = {token_id: float(values[token_id])}
    count = min(count, len(values))
    best = np.argpartition(-values, count - 1)[:count]
    wanted.update({int(i): float(values[i]) for i in best[np.argsort(-values[best], kind="stable")]})
    return wanted


def choose_token(
    row: np.ndarray,
    params: SamplingParams,
    token_ids: list[int],
    num_output_tokens: int,
    eos_token_ids: tuple[int, ...],
    rng: np.random.Generator,
) -> int:
    """Token chosen from one float32 [vocab] row: penalty, forbidden stops, temperature, top-k, top-p, then a draw.

    `token_ids` are prompt and output so far (the repetition penalty looks at both, as Keskar et al. 2019 and the
    Hugging Face implementation do). With temperature 0 the argmax of the adjusted row.
    """
    logits = row.astype(np.float64)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(token_ids, np.int64))
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if num_output_tokens < params.min_tokens:
        logits[[token for token in (*eos_token_ids, *params.stop_token_ids) if token < len(logits)]] = -np.inf
    if params.greedy:
        return int(logits.argmax())
    logits /= params.temperature
    order = np.argsort(-logits, kind="stable")
    if params.top_k > 0:
        order = order[: params.top_k]
    weights = np.exp(logits[order] - logits[order[0]])
    weights /= weights.sum()
    if params.top_p < 1.0:
        # Keep the smallest set whose mass reaches top_p (Holtzman et al. 2019).
        keep = int(np.searchsorted(np.cumsum(weights), params.top_p)) + 1
        order, weights = order[:keep], weights[:keep] / weights[:keep].sum()
    return int(order[min(int(np.searchsorted(np.cumsum(weights), rng.random())), len(order) - 1)])


def needs_row(params: SamplingParams, num_output_tokens: int) -> bool:
    """Whether the in-step argmax is not enough to choose the next token."""
    return not params.greedy or params.repetition_penalty != 1.0 or num_output_tokens < params.min_tokens
