"""Bodies of OpenAI's API, with vLLM's extensions under vLLM's names; what they may say and what that means here."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from fastapi import Request
from pydantic import Field

from isologit.engine.request import SamplingParams
from isologit.errors import RequestError
from isologit.server.fields import CHAT, COMPLETIONS, Body, FieldError, ListOf

_MOST_CHOICES = 128
_MOST_LOGPROBS = 20
_DEFAULT_TOKENS = 16
_TOKEN_ID = re.compile(r"[0-9]{1,9}", re.ASCII)
_MOST_ENTRIES = {"stop": 128, "bad_words": 128, "logit_bias": 1024}  # each of them costs time at every token


class StreamOptions(Body):
    """What a stream also tells: the usage at its end, or so far with every event."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class CommonRequest(Body):
    """Fields of both kinds of request."""

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=1e4)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=_MOST_CHOICES)
    seed: int | None = Field(default=None, ge=0)
    stop: str | ListOf[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Any] | None = None
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    min_tokens: int | None = Field(default=None, ge=0)
    stop_token_ids: ListOf[int] | None = None
    include_stop_str_in_output: bool | None = False
    bad_words: ListOf[str] | None = None
    allowed_token_ids: ListOf[int] | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=_MOST_LOGPROBS)
    ignore_eos: bool | None = False
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False

    def check(self, http: Request, vocab_size: int) -> None:
        """Raises RequestError for fields that ask for what is not done, or that contradict each other."""
        if self.stream and self.prompt_logprobs is not None:
            raise FieldError("prompt_logprobs", "prompt_logprobs are not streamed; leave out stream")
        for name, most in _MOST_ENTRIES.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and len(value) > most:
                raise FieldError(name, f"{name} has {len(value)} entries; at most {most} are taken")
        if self.allowed_token_ids == []:
            raise FieldError("allowed_token_ids", "allowed_token_ids is empty; no token would be left")
        for name, ids in (("allowed_token_ids", self.allowed_token_ids), ("logit_bias", self._biases())):
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise FieldError(name, f"{name} has a token id outside 0..{vocab_size - 1}")
        if self.stream_options is not None:
            if not self.stream:
                raise FieldError("stream_options", "stream_options has a meaning only with stream set to true")
            self.stream_options.check_others({}, http)
        if self.truncate_prompt_tokens == 0:
            raise FieldError(
                "truncate_prompt_tokens", "truncate_prompt_tokens must be at least 1, or -1 for all that fit"
            )

    def truncated(self, ids: list[int], most: int) -> list[int]:
        """The last tokens of a prompt, if it is to be cut; `most` is the longest prompt that there is."""
        if self.truncate_prompt_tokens is None:
            return ids
        count = most if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens
        return ids[-count:]

    def _biases(self) -> dict[int, float]:
        """`logit_bias` with its keys as numbers."""
        found: dict[int, float] = {}
        for key, value in (self.logit_bias or {}).items():
            if not _TOKEN_ID.fullmatch(key):
                raise FieldError("logit_bias", "logit_bias must map token ids to numbers; a key is no token id")
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise FieldError("logit_bias", f"logit_bias must map token ids to numbers; {key} has none")
            found[int(key)] = float(value)
        return found

    def sampling_params(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """The engine's form; OpenAI samples at temperature 1 unless told otherwise."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self._biases() or None,
            allowed_token_ids=self.allowed_token_ids,
            bad_words=tuple(word for word in self.bad_words or () if word),
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=self.seed,
            stop=tuple(stop for stop in stops if stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(CommonRequest):
    """The body of /v1/completions."""

    prompt: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=_MOST_LOGPROBS)
    add_special_tokens: bool | None = True
    best_of: int | None = None

    def check(self, http: Request, vocab_size: int) -> None:
        """As `CommonRequest.check`."""
        super().check(http, vocab_size)
        self.check_others(COMPLETIONS, http)
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise FieldError("max_tokens", "max_tokens must be at least 1, unless echo or prompt_logprobs is set")
        if self.stream and self.echo and self.logprobs is not None:
            raise FieldError("echo", "echo with logprobs is not streamed; leave out stream")
        if (self.best_of or 1) > (self.n or 1):
            raise FieldError("best_of", "best_of above n is not supported; leave it out")

    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt. Raises RequestError when there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise FieldError("prompt", "prompt is an empty list; give at least one prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def params(self) -> SamplingParams:
        """The engine's form."""
        max_tokens = _DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens
        asked = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        return self.sampling_params(max_tokens, self.logprobs, max(asked, default=None))


class Message(Body):
    """One message of a conversation; content may be parts of text. Templates may read other fields than these."""

    role: str
    content: str | ListOf[dict[str, Any]] | None = None

    def flat(self) -> dict[str, Any]:
        """With its parts joined. Raises RequestError for parts that are not text."""
        content = self.content or ""
        if not isinstance(content, str):
            if any(not isinstance(part.get("text"), str) for part in content):
                raise RequestError("only parts of type text are supported in a message's content")
            content = "".join(part["text"] for part in content)
        return {**self.model_dump(), "content": content}


class ChatRequest(CommonRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[ListOf[Message], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=_MOST_LOGPROBS)
    add_special_tokens: bool | None = False
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    documents: ListOf[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self, http: Request, vocab_size: int) -> None:
        """As `CommonRequest.check`."""
        super().check(http, vocab_size)
        self.check_others(CHAT, http)
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs has a meaning only with logprobs set to true")

    def params(self, room: int) -> SamplingParams:
        """The engine's form. room: tokens behind the prompt, all of them an answer's unless told otherwise."""
        limits = (self.max_completion_tokens, self.max_tokens)
        max_tokens = next((limit for limit in limits if limit is not None), max(1, room))
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(max_tokens, logprobs, self.prompt_logprobs)
