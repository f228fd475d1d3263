"""What a run is asked to do, checked when built. Knows nothing of how it is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from isologit.errors import ConfigError

LoadFormat = Literal["auto", "dummy"]
QkvLayout = Literal["concat", "interleaved"]
SaveLogits = Literal["none", "captured", "contest"]
Order = Literal["longest-first", "given"]

DEFAULT_BASELINE_REQUESTS = 48
DEFAULT_MAX_NEW_TOKENS = 128
DEFAULT_SPECULATIVE_TOKENS = 8

_AT_LEAST_ONE = ("limit", "max_new_tokens", "max_num_seqs", "max_num_batched_tokens", "num_threads", "capture_rows")
_AT_LEAST_ZERO = ("seed", "capture_seed", "num_speculative_tokens", "baseline_requests")

# NOTE: these change neither what is computed nor what is timed, so a resumed run may be given others.
_FREE_ON_RESUME = ("output", "resume", "baseline_requests", "certify_seconds", "num_threads", "capture_seed", "profile")


@dataclass(frozen=True)
class RunOptions:
    """Everything `isologit run` can be told. Raises ConfigError for values that mean nothing.

    model: folder, file, preset or config.json; None is the built-in demo model. dataset: None is the built-in prompts,
    or the replay file when there is one. baseline_requests: None measures all. capture_rows, capture_seed,
    certify_seconds: None chooses. num_speculative_tokens: 0 turns speculation off. draft_model: folder, file or preset
    of a smaller model that guesses; None looks guesses up in the request's own text.
    """

    model: str | None = None
    dataset: Path | None = None
    output: Path | None = None
    limit: int | None = None
    load_format: LoadFormat = "auto"
    tokenizer: Path | None = None
    qkv_layout: QkvLayout | None = None
    replay: Path | None = None
    ignore_eos: bool = False
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    num_speculative_tokens: int = DEFAULT_SPECULATIVE_TOKENS
    draft_model: str | None = None
    order: Order = "longest-first"
    num_threads: int | None = None
    seed: int = 0
    baseline_requests: int | None = DEFAULT_BASELINE_REQUESTS
    certify_seconds: float | None = None
    save_logits: SaveLogits = "captured"
    capture_rows: int | None = None
    capture_seed: int | None = None
    resume: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        for names, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ConfigError(f"{name} must be at least {least}, not {value}")
        if self.certify_seconds is not None and not self.certify_seconds > 0:
            raise ConfigError(f"certify_seconds must be above 0, not {self.certify_seconds}")
        if self.load_format == "dummy" and self.model is None:
            raise ConfigError("load_format dummy needs a model: a preset name or a config.json")
        if self.draft_model is not None and not self.num_speculative_tokens:
            raise ConfigError("draft_model guesses nothing when num_speculative_tokens is 0; leave one of them out")
        if self.resume and self.output is None:
            raise ConfigError("resume needs the output folder of the interrupted run; name it with --output")

    @property
    def mode(self) -> Literal["greedy", "replay"]:
        """How output tokens are chosen."""
        return "greedy" if self.replay is None else "replay"

    @property
    def dataset_file(self) -> Path | None:
        """The file prompts come from; None is the built-in prompts."""
        return self.dataset or self.replay

    def output_folder(self) -> Path:
        """The folder asked for, or `runs/` and the time now."""
        return self.output or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H%M%S")

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the interrupted one."""
        return {name: value for name, value in self.to_dict().items() if name not in _FREE_ON_RESUME}

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}
