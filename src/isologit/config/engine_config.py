"""Options of the engine, validated when built. `None` means the planner chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isologit.errors import ConfigError


@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are guessed ahead; names as in vLLM.

    "ngram" is prompt lookup: what followed the last occurrence of the current n-gram in prompt and output is proposed
    again. "draft_model" asks a smaller `model` of the same vocabulary. None takes the one that `model` calls for.
    `num_speculative_tokens` bounds one proposal; the proposer shortens it by what it learns of each request.
    """

    method: str | None = None
    model: str | None = None
    num_speculative_tokens: int = 8
    prompt_lookup_max: int = 3
    prompt_lookup_min: int = 2

    def __post_init__(self) -> None:
        fitting = "ngram" if self.model is None else "draft_model"
        if self.method is None:
            object.__setattr__(self, "method", fitting)
        if self.method not in ("ngram", "draft_model"):
            raise ConfigError(f'speculative_config: method "{self.method}" is unknown; use "ngram" or "draft_model"')
        if self.method != fitting:
            raise ConfigError('speculative_config: a model goes with method "draft_model", and only with it')
        if not 1 <= self.num_speculative_tokens <= 64:
            raise ConfigError("speculative_config: num_speculative_tokens must be between 1 and 64")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ConfigError("speculative_config: need 1 <= prompt_lookup_min <= prompt_lookup_max")


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. Names follow vLLM's where they mean the same."""

    max_num_seqs: int | None = None  # running slots
    max_num_batched_tokens: int | None = None  # tokens of one step
    enable_prefix_caching: bool = True
    longest_first: bool = True
    speculative: SpeculativeConfig | None = None
    kv_cache_memory_bytes: int | None = None
    num_threads: int | None = None
    backend: str = "auto"  # a name in `backends/registry.py`
    device: str = "auto"  # as in torch: "cpu", "cuda", "cuda:1", ...
    seed: int = 0
    logprobs_mode: Literal["raw_logprobs", "raw_logits"] = "raw_logprobs"  # what `logprobs` are

    def __post_init__(self) -> None:
        if self.logprobs_mode not in ("raw_logprobs", "raw_logits"):
            raise ConfigError(f'logprobs_mode "{self.logprobs_mode}" is unknown; use "raw_logprobs" or "raw_logits"')
        for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        slots, budget = self.max_num_seqs, self.max_num_batched_tokens
        if slots is not None and budget is not None and budget < slots:
            raise ConfigError(
                f"max_num_batched_tokens ({budget}) must be at least max_num_seqs ({slots}): "
                "every running request needs one token a step"
            )
