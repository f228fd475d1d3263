"""What the job needs of an engine and of a baseline, and how the real engine is made.

Tests put others in their place. Nothing here knows what a run is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

from isologit.checkpoints.checkpoint import Checkpoint
from isologit.common.load_progress import OnLoadProgress
from isologit.config import EngineOptions, ModelConfig
from isologit.engine.planner import Plan
from isologit.engine.request import GenerationRequest, RequestOutput
from isologit.engine.step_record import StepRecord
from isologit.text.tokenizer import Tokenizer


class Engine(Protocol):
    """`isologit.LLM`, or something that acts like it."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint
    num_threads: int
    step_records: list[StepRecord]
    last_plan: Plan | None

    def check(self, request: GenerationRequest) -> None: ...
    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[RequestOutput]: ...
    def warm_up(self) -> None: ...
    def describe(self) -> dict[str, Any]: ...
    def phase_seconds(self) -> dict[str, float]: ...
    def close(self) -> None: ...


class TimedBaseline(Protocol):
    """`fidelity.Reference`, of which the baseline is the `generate`."""

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        eos_token_ids: Collection[int] = (),
        *,
        ignore_eos: bool = False,
        forced: Sequence[int] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]: ...
    def identity(self) -> dict[str, str]: ...


EngineFactory = Callable[[EngineOptions, OnLoadProgress | None], Engine]


def require_backend(options: EngineOptions) -> None:
    """As `isologit.llm.require_backend`."""
    from isologit import llm

    llm.require_backend(options)


def load_engine(options: EngineOptions, on_load_progress: OnLoadProgress | None = None) -> Engine:
    """The `LLM` these options ask for. Raises ModelError or ConfigError."""
    from isologit.llm import LLM

    return LLM(options=options, on_load_progress=on_load_progress)
