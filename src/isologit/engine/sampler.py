"""Choosing a token from a row of logits when the request wants more than the argmax the step already computed."""

from __future__ import annotations

import numpy as np

from isologit.engine.request import SamplingParams

_LARGEST = 1e300  # far beyond any logit; the difference of two is still a number


def top_logprobs(row: np.ndarray, token_id: int, count: int, normaliser: float) -> dict[int, float]:
    """Log-probability of `token_id` and of the `count` most likely tokens, by token id.

    row: float32 [vocab] logits. normaliser: the logarithm of the sum of their exponentials, or 0 for the logits as
    they are.
    """
    wanted = {token_id: float(row[token_id]) - normaliser}
    count = min(count, len(row))
    if count:
        best = np.argpartition(-row, count - 1)[:count]
        wanted.update({int(i): float(row[i]) - normaliser for i in best[np.argsort(-row[best], kind="stable")]})
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
        with np.errstate(over="ignore"):  # a penalty near 0 makes infinities, whose differences would be NaN
            values = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits[seen] = values.clip(-_LARGEST, _LARGEST)
    if num_output_tokens < params.min_tokens:
        logits[[token for token in (*eos_token_ids, *params.stop_token_ids) if token < len(logits)]] = -np.inf
    if params.greedy:
        return int(logits.argmax())
    logits -= logits.max()  # before the division, so that a tiny temperature ends at the argmax and not at NaN
    with np.errstate(over="ignore"):
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
