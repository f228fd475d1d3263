"""What a request may be: the one place that says whether it can ever run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isologit.engine.request import GenerationRequest
from isologit.engine.sampling_params import SamplingParams
from isologit.errors import RequestError


class PromptTooLongError(RequestError):
    """A prompt and its answer do not fit into a request; in the words that clients of OpenAI's API look for.

    prompt_tokens, max_tokens: what was asked for. limit: what fits, in tokens.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int, limit: int) -> None:
        self.prompt_tokens, self.max_tokens, self.limit = prompt_tokens, max_tokens, limit
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} in the completion). "
            f"Please reduce the length of the prompt or of the completion."
        )


@dataclass(frozen=True)
class RequestLimits:
    """max_model_len: prompt and output tokens of one request. max_kv_tokens: tokens whose keys and values fit into
    memory. vocab_size: None does not look at ids. has_tokenizer: whether stop strings and bad words can be read.
    """

    max_model_len: int
    max_kv_tokens: int
    vocab_size: int | None = None
    has_tokenizer: bool = True

    def check_request(self, request: GenerationRequest) -> None:
        """As `check`, and the message says which request it was."""
        try:
            self.check(request.prompt_token_ids, request.params, request.replay_token_ids)
        except RequestError as error:
            raise RequestError(f"request {request.request_id}: {error}") from None

    def check(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, replay_token_ids: Sequence[int] | None = None
    ) -> None:
        """Raise RequestError, naming the limit, for a request that can never run."""
        if not prompt_token_ids:
            raise RequestError("the prompt is empty; give at least one token")
        self.check_ids(prompt_token_ids, "a prompt token id", "use the model's own tokenizer")
        self.check_ids(replay_token_ids or (), "a replayed token id", "record it with this model")
        self.check_ids(params.allowed_token_ids or (), "a token id of allowed_token_ids", "leave it out")
        self.check_ids(params.logit_bias or (), "a token id of logit_bias", "leave it out")
        if not self.has_tokenizer:
            for name, instead in (("stop", "stop_token_ids"), ("bad_words", "logit_bias")):
                if getattr(params, name):
                    raise RequestError(f"{name} needs a tokenizer, and this model has none; use {instead}")
        num_prompt, num_output = len(prompt_token_ids), params.max_tokens
        if replay_token_ids is not None:
            num_output = min(num_output, len(replay_token_ids))
        if num_prompt + num_output > self.max_model_len:
            raise PromptTooLongError(num_prompt, num_output, self.max_model_len)
        needed = num_prompt + num_output - 1  # the last token's keys and values need no room
        if needed > self.max_kv_tokens:
            raise RequestError(
                f"the keys and values of {needed} tokens do not fit into the key/value memory, which has room for "
                f"{self.max_kv_tokens}; shorten the request or raise kv_cache_memory_bytes"
            )

    def check_ids(self, token_ids: Iterable[int], what: str, advice: str) -> None:
        """Raise RequestError for ids outside the vocabulary."""
        if self.vocab_size is not None and any(not 0 <= token < self.vocab_size for token in token_ids):
            raise RequestError(f"{what} is outside 0..{self.vocab_size - 1}; {advice}")
