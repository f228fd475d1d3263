"""Options of the engine, validated when built: one object, embedded in the options of every command that runs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from isologit.errors import ConfigError

LoadFormat = Literal["auto", "dummy"]
QkvLayout = Literal["concat", "interleaved"]
LogprobsMode = Literal["raw_logprobs", "raw_logits"]

_AT_LEAST_ONE = ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes", "num_threads")
_MOST_SPECULATIVE_TOKENS = 64


@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are drafted; names as in vLLM.

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
        if not 1 <= self.num_speculative_tokens <= _MOST_SPECULATIVE_TOKENS:
            raise ConfigError(
                f"speculative_config: num_speculative_tokens must be between 1 and {_MOST_SPECULATIVE_TOKENS}, not "
                f"{self.num_speculative_tokens}"
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ConfigError("speculative_config: need 1 <= prompt_lookup_min <= prompt_lookup_max")


def speculation(num_speculative_tokens: int, draft_model: str | None = None) -> SpeculativeConfig | None:
    """Speculation as the command line words it: 0 tokens turn it off. Raises ConfigError for what means nothing."""
    if num_speculative_tokens:
        return SpeculativeConfig(model=draft_model, num_speculative_tokens=num_speculative_tokens)
    if draft_model is not None:
        raise ConfigError("draft_model drafts nothing when num_speculative_tokens is 0; leave one of them out")
    return None


@dataclass(frozen=True)
class EngineOptions:
    """Which model runs, and how. Names follow vLLM's where they mean the same. Raises ConfigError for bad values.

    model: Hugging Face LLaMA folder or MindFormers checkpoint, or with `load_format` "dummy" a preset or config.json;
    None is the built-in demo model. model_config: a `config.json` or MindFormers YAML to use instead of the one beside
    the weights. tokenizer: folder or file, when it is not in the model's folder. device: as in torch ("cpu", "cuda:1").
    backend: a name in `backends/registry.py`. numerics: what the backend keeps of float32 values, one of its schemes.
    "auto" takes the best that this machine can use. max_num_seqs (running
    slots) and max_num_batched_tokens (tokens of one step): None lets the planner choose. longest_first: the order in
    which requests start. speculative_config: None turns speculation off. kv_cache_memory_bytes: bound of keys and
    values; None takes up to half of the free memory, as far as the running requests need it. num_threads: None uses
    every core. weight_cache: whether weights of large models may be kept on disk as the backend needs them, for the
    next start. seed: of dummy weights and of requests without a seed. logprobs_mode: what `logprobs` are.
    """

    model: str | None = None
    model_config: Path | None = None
    tokenizer: Path | None = None
    load_format: LoadFormat = "auto"
    qkv_layout: QkvLayout | None = None
    device: str = "auto"
    backend: str = "auto"
    numerics: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    longest_first: bool = True
    speculative_config: SpeculativeConfig | None = SpeculativeConfig()
    kv_cache_memory_bytes: int | None = None
    num_threads: int | None = None
    weight_cache: bool = True
    seed: int = 0
    logprobs_mode: LogprobsMode = "raw_logprobs"

    def __post_init__(self) -> None:
        for name, known in (("load_format", LoadFormat), ("logprobs_mode", LogprobsMode)):
            if getattr(self, name) not in get_args(known):
                choices = " or ".join(f'"{choice}"' for choice in get_args(known))
                raise ConfigError(f'{name} "{getattr(self, name)}" is unknown; use {choices}')
        if self.load_format == "dummy" and self.model is None:
            raise ConfigError("load_format dummy needs a model: a preset name or a config.json")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, not {self.seed}")
        slots, budget = self.max_num_seqs, self.max_num_batched_tokens
        if slots is not None and budget is not None and budget < slots:
            raise ConfigError(
                f"max_num_batched_tokens ({budget}) must be at least max_num_seqs ({slots}): "
                "every running request needs one token a step"
            )

    @property
    def num_speculative_tokens(self) -> int:
        """Most tokens of a draft; 0 when speculation is off."""
        return 0 if self.speculative_config is None else self.speculative_config.num_speculative_tokens

    @property
    def draft_model(self) -> str | None:
        """The smaller model that drafts, if there is one."""
        return None if self.speculative_config is None else self.speculative_config.model

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}
