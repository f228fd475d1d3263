"""How a request's output tokens are chosen and when they end. Knows no logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from isologit.errors import RequestError

_LARGEST_BIAS = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """Names and meaning as in vLLM; the default is greedy. Raises RequestError for bad values.

    max_tokens: 0 scores the prompt only. `stop` may be one string or several, and is kept as a tuple; it ends the
    output after the first `min_tokens` tokens, and the text before it, unless `include_stop_str_in_output`; a token of
    `stop_token_ids` ends the text alike. `top_k` 0 or -1 means the whole vocabulary. min_p: tokens less likely than
    this times the likeliest are left out. presence_penalty and frequency_penalty (-2 to 2) look at the output,
    repetition_penalty at the prompt too. logit_bias: added to the logits of tokens, held between -100 and 100.
    allowed_token_ids: no other token is chosen. bad_words: texts whose last token is never chosen after their others.
    logprobs, prompt_logprobs: that many most likely tokens are told beside each token of the output, or of the prompt.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: SequenceABC[int] | None = None
    bad_words: SequenceABC[str] = ()
    seed: int | None = None
    stop: str | SequenceABC[str] = ()
    stop_token_ids: SequenceABC[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_logits: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("include_stop_str_in_output", "ignore_eos", "return_logits"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        _require(_are_texts(stops), "stop", "a non-empty string or a sequence of them", self.stop)
        _require(
            not isinstance(self.bad_words, str) and _are_texts(self.bad_words),
            "bad_words", "a sequence of non-empty strings", self.bad_words,
        )  # fmt: skip
        _require(
            _are_tokens(self.stop_token_ids),
            "stop_token_ids", "a sequence of integers of at least 0", self.stop_token_ids,
        )  # fmt: skip
        _require(
            self.allowed_token_ids is None or (_are_tokens(self.allowed_token_ids) and len(self.allowed_token_ids) > 0),
            "allowed_token_ids", "None or a non-empty sequence of integers of at least 0", self.allowed_token_ids,
        )  # fmt: skip
        bias = self.logit_bias
        _require(
            bias is None
            or (isinstance(bias, Mapping) and _are_tokens(list(bias)) and all(map(_is_finite, bias.values()))),
            "logit_bias", "None or a mapping from token ids to finite numbers", bias,
        )  # fmt: skip
        object.__setattr__(self, "stop", tuple(stops))
        object.__setattr__(self, "bad_words", tuple(self.bad_words))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if bias is not None:
            held = {int(token): min(max(float(b), -_LARGEST_BIAS), _LARGEST_BIAS) for token, b in bias.items()}
            object.__setattr__(self, "logit_bias", held)

    def _check_numbers(self) -> None:
        _require(_is_int(self.max_tokens, 0), "max_tokens", "an integer of at least 0", self.max_tokens)
        _require(
            _is_int(self.min_tokens, 0) and self.min_tokens <= self.max_tokens,
            "min_tokens", f"an integer between 0 and max_tokens ({self.max_tokens})", self.min_tokens,
        )  # fmt: skip
        _require(
            _is_finite(self.temperature) and self.temperature >= 0,
            "temperature", "a finite number of at least 0 (0 is greedy)", self.temperature,
        )  # fmt: skip
        _require(_is_int(self.top_k, -1), "top_k", "an integer of at least 1, or 0 or -1 for all tokens", self.top_k)
        _require(_is_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(_is_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number between 0 and 1", self.min_p)
        _require(
            _is_finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty", "a finite number above 0", self.repetition_penalty,
        )  # fmt: skip
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(_is_finite(value) and -2 <= value <= 2, name, "a number between -2 and 2", value)
        _require(self.seed is None or _is_int(self.seed, 0), "seed", "None or an integer of at least 0", self.seed)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or _is_int(value, 0), name, "None or an integer of at least 0", value)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def adjusts_logits(self) -> bool:
        """Whether the largest logit may not be the most likely token, at any place of the output."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.allowed_token_ids is not None
            or self.bad_words
        )


def _require(holds: bool, name: str, allowed: str, value: Any) -> None:
    if not holds:
        raise RequestError(f"{name} must be {allowed}, not {value!r}")


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_tokens(values: Any) -> bool:
    return isinstance(values, SequenceABC) and all(_is_int(token, 0) for token in values)


def _are_texts(values: Any) -> bool:
    return isinstance(values, SequenceABC) and all(isinstance(text, str) and text for text in values)
