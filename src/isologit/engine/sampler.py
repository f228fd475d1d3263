"""Choosing a token from a row of logits when the request wants more than the argmax the step already computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isologit.engine.sampling_params import SamplingParams
from isologit.text.tokenizer import Tokenizer

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


def bad_word_tokens(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token sequences that spell the words, as vLLM finds them: at the start of a text, and after a space.

    The second counts only where it begins with another token and is as long, as of tokenizers that join the space.
    """
    found: list[list[int]] = []
    for word in words:
        alone = tokenizer.encode_without_bos(word.lstrip())
        spaced = tokenizer.encode_without_bos(" " + word.lstrip())
        found.append(alone)
        if spaced[:1] != alone[:1] and len(spaced) == len(alone):
            found.append(spaced)
    return [tokens for tokens in found if tokens]


class Sampler:
    """Chooses the tokens of one request. Order and meaning of the steps are those of vLLM.

    Bias, penalties, tokens that are out, then the argmax; or temperature, min-p, top-k, top-p and a draw from `rng`.
    stop_ids: tokens that may not come among the first `min_tokens`. tokenizer: reads the bad words.
    """

    def __init__(
        self,
        params: SamplingParams,
        rng: np.random.Generator,
        *,
        stop_ids: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._params = params
        self._rng = rng
        self._stop_ids = stop_ids
        self._bad_words = [] if tokenizer is None else bad_word_tokens(params.bad_words, tokenizer)

    def choose(self, row: np.ndarray, token_ids: list[int], num_prompt_tokens: int) -> int:
        """Token chosen from one float32 [vocab] row; `token_ids` are the prompt and the output so far."""
        logits = row.astype(np.float64)
        self._adjust(logits, token_ids, token_ids[num_prompt_tokens:])
        return int(logits.argmax()) if self._params.greedy else self._draw(logits)

    def _adjust(self, logits: np.ndarray, token_ids: list[int], output: list[int]) -> None:
        params = self._params
        if params.logit_bias:
            tokens = np.fromiter(params.logit_bias, np.int64)
            logits[tokens] += np.fromiter(params.logit_bias.values(), np.float64)
        if params.repetition_penalty != 1.0:  # Keskar et al. 2019
            seen = np.unique(np.asarray(token_ids, np.int64))
            values = logits[seen]
            with np.errstate(over="ignore"):  # a penalty near 0 makes infinities, whose differences would be NaN
                values = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            logits[seen] = values.clip(-_LARGEST, _LARGEST)
        if output and (params.frequency_penalty or params.presence_penalty):
            seen, counts = np.unique(np.asarray(output, np.int64), return_counts=True)
            logits[seen] -= params.frequency_penalty * counts + params.presence_penalty
        if params.allowed_token_ids is not None:
            allowed = list(params.allowed_token_ids)
            kept = logits[allowed]
            logits[:] = -np.inf
            logits[allowed] = kept
        out = [word[-1] for word in self._bad_words if output[max(0, len(output) - len(word) + 1) :] == word[:-1]]
        if len(output) < params.min_tokens:
            out += [token for token in self._stop_ids if token < len(logits)]
        kept = logits[out]
        logits[out] = -np.inf
        if np.isneginf(logits.max()):
            logits[out] = kept  # one token must come

    def _draw(self, logits: np.ndarray) -> int:
        params = self._params
        logits -= logits.max()  # before the division, so that a tiny temperature ends at the argmax and not at NaN
        with np.errstate(over="ignore"):
            logits /= params.temperature
        order = np.argsort(-logits, kind="stable")
        weights = np.exp(logits[order])
        keep = len(order)
        if params.min_p > 0.0:
            keep = int(np.count_nonzero(weights >= params.min_p))
        if params.top_k > 0:
            keep = min(keep, params.top_k)
        weights = weights[:keep] / weights[:keep].sum()
        if params.top_p < 1.0:
            # Keep the smallest set whose mass reaches top_p (Holtzman et al. 2019).
            keep = int(np.searchsorted(np.cumsum(weights), params.top_p)) + 1
            weights = weights[:keep] / weights[:keep].sum()
        place = int(np.searchsorted(np.cumsum(weights), self._rng.random()))
        return int(order[min(place, len(weights) - 1)])
