"""One logits row that was kept, and everything that was fed to the model before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isologit.fidelity.files import token_hash


@dataclass(frozen=True)
class CapturedRow:
    """The row that chose output token `index` of a request.

    prompt_token_ids: the prompt. token_ids: the request's output, at least up to `index`. logits: float32 [vocab].
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    index: int
    logits: np.ndarray

    @property
    def position(self) -> int:
        """0-based position of the last token fed before this row."""
        return len(self.prompt_token_ids) - 1 + self.index

    @property
    def fed_token_ids(self) -> list[int]:
        """Prompt and output up to the token this row chose, without it."""
        return [*self.prompt_token_ids, *self.token_ids[: self.index]]

    @property
    def prompt_sha256(self) -> str:
        """Hash of the prompt: pairs the rows of two runs."""
        return token_hash(self.prompt_token_ids)

    @property
    def context_sha256(self) -> str:
        """Hash of all that was fed: tells whether two paired rows answer the same question."""
        return token_hash(self.fed_token_ids)
