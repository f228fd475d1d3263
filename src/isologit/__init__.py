"""Run prompts through a LLaMA-family model in the least total time, and prove that the logits did not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isologit.engine.request import GenerationRequest, RequestOutput, SamplingParams
    from isologit.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "GenerationRequest", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the engine on first use: the command line starts without loading it."""
    if name == "LLM":
        from isologit.llm import LLM

        return LLM
    if name in {"GenerationRequest", "RequestOutput", "SamplingParams"}:
        from isologit.engine import request

        return getattr(request, name)
    raise AttributeError(f"module 'isologit' has no attribute {name!r}")
