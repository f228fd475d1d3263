"""One completed request against the reference: did it end as it should, and is every token the reference's own?

Owns what is checked of a request. It does not know how many requests are checked, nor the verdict.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isologit.fidelity.files import json_number


@dataclass(frozen=True)
class ScoredRequest:
    """One request: what was issued, and what the run says came of it.

    NOTE: prompt, max_tokens and the stop rules must come from whoever issued the request, not from the engine's answer.
    token_ids: the output, with the EOS that ended it. finish_reason: "stop", "length", or, for a request that failed
    while running, "abort" or "error". stop_token_ids: ids besides EOS that may end it. stop_strings: whether text may
    end it, which ids alone cannot show.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    finish_reason: str
    max_tokens: int
    ignore_eos: bool = False
    stop_token_ids: Collection[int] = ()
    stop_strings: bool = False

    @property
    def completed(self) -> bool:
        """Whether the run says it has the whole answer."""
        return self.finish_reason in ("stop", "length")


@dataclass(frozen=True)
class Divergence:
    """An output token that is not the reference's argmax.

    theirs: the reference's argmax. margin: the reference's logit of `theirs` minus its logit of `ours`. tie: whether
    the margin is small enough to be rounding.
    """

    request_id: str
    output_index: int
    ours: int
    theirs: int
    margin: float
    tie: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return {**asdict(self), "margin": json_number(self.margin)}


def finish_problem(request: ScoredRequest, eos_token_ids: Collection[int]) -> str | None:
    """Why a completed request may not have ended where it did, or None.

    "length" needs exactly max_tokens tokens, "stop" a last token that ends a request, and no token before the last may
    end it. EOS ends a request unless ignore_eos.
    """
    tokens, limit = request.token_ids, request.max_tokens
    ends = {*request.stop_token_ids, *(() if request.ignore_eos else eos_token_ids)}
    early = next((i for i, token in enumerate(tokens[:-1]) if token in ends), None)
    if early is not None:
        return f"token {early} ends the request, and {len(tokens) - early - 1} more follow"
    if len(tokens) > limit:
        return f"{len(tokens)} tokens, {limit} were asked for"
    if request.finish_reason == "length":
        return None if len(tokens) == limit else f'"length" after {len(tokens)} of {limit} tokens'
    if tokens and (tokens[-1] in ends or request.stop_strings):
        return None
    return f'"stop" after {len(tokens)} tokens, and the last one does not end a request'


def bad_token(request: ScoredRequest, vocab_size: int) -> int | None:
    """The first token id of prompt or output that the vocabulary does not have, or None."""
    listed = (*request.prompt_token_ids, *request.token_ids)
    return next((token for token in listed if not 0 <= token < vocab_size), None)


def find_divergences(request: ScoredRequest, rows: np.ndarray) -> list[Divergence]:
    """Output tokens that are not the argmax of the reference's float32 [n, vocab] rows (`tie` is still open)."""
    tokens = np.asarray(request.token_ids, np.int64)
    best = rows.argmax(axis=1)
    found = []
    for i in np.flatnonzero(best != tokens).tolist():
        margin = float(rows[i, best[i]]) - float(rows[i, tokens[i]])
        found.append(Divergence(request.request_id, i, int(tokens[i]), int(best[i]), margin))
    return found
