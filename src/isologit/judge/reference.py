"""The judge's own model of the tokens: Hugging Face's LLaMA in float32, one request at a time, with its own tokenizer.

Nothing of an entry is used. Results are kept, for every audit and every repeat asks for the same tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from isologit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from isologit.common.commitment import LogitScale
from isologit.errors import ModelError
from isologit.text.tokenizer import Tokenizer, load_tokenizer


class ScoringModel(Protocol):
    """What audits ask of the reference."""

    vocab_size: int
    hidden_size: int
    num_parameters: int
    eos_token_ids: tuple[int, ...]
    scale: LogitScale

    def prompt_ids(self, prompt: str) -> list[int]: ...
    def text_of(self, token_ids: Sequence[int]) -> str: ...
    def hidden(self, prompt: str, token_ids: Sequence[int]) -> np.ndarray: ...
    def logits(self, hidden: np.ndarray) -> np.ndarray: ...


@dataclass
class _Scored:
    hidden: np.ndarray


class JudgeReference:
    """A checkpoint as plain transformers runs it. Raises ModelError for a model without a tokenizer."""

    def __init__(self, model: Path, checkpoint: Checkpoint | None = None) -> None:
        from isologit.fidelity import Reference

        self.checkpoint = checkpoint or open_checkpoint(model)
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise ModelError(f"{model}: a judge needs the model's tokenizer beside its weights")
        self._tokenizer: Tokenizer = tokenizer
        config = self.checkpoint.config
        self._reference = Reference(self.checkpoint)
        self._head = self._reference.head_weight()
        self.scale = LogitScale.of(self._head)
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_parameters = (
            config.num_parameters - config.vocab_size * config.hidden_size
        )  # the embedding is looked up
        self.eos_token_ids = config.eos_token_ids
        self._kept: dict[tuple[str, tuple[int, ...]], _Scored] = {}

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids with BOS, by the judge's tokenizer."""
        return self._tokenizer.encode(prompt)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Text of output tokens; special tokens are left out."""
        return self._tokenizer.decode(list(token_ids))

    def hidden(self, prompt: str, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [n, hidden]: what the LM head reads to choose each output token, given the tokens before it."""
        key = (prompt, tuple(token_ids))
        if key not in self._kept:
            self._kept[key] = _Scored(self._reference.hidden(self.prompt_ids(prompt), token_ids))
        return self._kept[key].hidden

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """float32 [n, vocab] of rows [n, hidden], in the judge's own product."""
        return np.asarray(hidden @ self._head.T, np.float32)
