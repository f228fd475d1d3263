"""What a run is asked to do, checked when built. Knows nothing of how it is done."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from isologit.config import EngineOptions
from isologit.errors import ConfigError
from isologit.workload.dataset import DatasetFormat

SaveLogits = Literal["none", "captured", "contest"]

DEFAULT_BASELINE_REQUESTS = 48
DEFAULT_BASELINE_SECONDS = 300.0
DEFAULT_MAX_NEW_TOKENS = 128

_AT_LEAST_ONE = ("limit", "max_new_tokens", "capture_rows")
_AT_LEAST_ZERO = ("capture_seed", "baseline_requests")

# NOTE: these change neither what is computed nor what is timed, so a resumed run may be given others.
_FREE_ON_RESUME = (
    "output", "resume", "baseline_requests", "baseline_seconds", "certify_seconds", "num_threads", "weight_cache",
    "capture_seed", "profile",
)  # fmt: skip


@dataclass(frozen=True)
class RunOptions:
    """Everything `isologit run` can be told. Raises ConfigError for values that mean nothing.

    dataset: None is the built-in prompts, or the replay file when there is one. baseline_requests: None measures all;
    baseline_seconds: fewer are measured if they are predicted to take longer. capture_rows, capture_seed,
    certify_seconds: None chooses. The engine's seed also draws the baseline's sample.
    """

    engine: EngineOptions = EngineOptions()  # noqa: RUF009 - frozen
    dataset: Path | None = None
    dataset_format: DatasetFormat = "auto"
    output: Path | None = None
    limit: int | None = None
    replay: Path | None = None
    ignore_eos: bool = False
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    baseline_requests: int | None = DEFAULT_BASELINE_REQUESTS
    baseline_seconds: float = DEFAULT_BASELINE_SECONDS
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
        for name in ("certify_seconds", "baseline_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, not {value}")
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
        """Pure JSON, the engine's options among the others."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "engine"}
        return self.engine.to_dict() | {name: str(v) if isinstance(v, Path) else v for name, v in own.items()}
