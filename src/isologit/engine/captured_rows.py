"""Logits rows that requests asked to keep, made for many requests together.

A row is kept as what the LM head reads, which is small; its logits cost a pass over the head's weights, however many
rows are made in it. So a finished request waits for others, half a second at most.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from isologit.engine.request import RequestOutput

LONGEST_HOLD_S = 0.5

LAST_TOKEN = -1  # in `GenerationRequest.capture`: the row of whatever output token turns out to be the last

Finals = dict[int, np.ndarray]  # by index of the output token: float32 [hidden], what the LM head reads


class CapturedRows:
    """Finished requests whose captured rows are still to be made."""

    def __init__(self, project: Callable[[np.ndarray], np.ndarray]) -> None:
        """project: the LM head, float32 [n, hidden] to float32 [n, vocab]."""
        self._project = project
        self._held: list[tuple[RequestOutput, Finals]] = []
        self._since_s = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, output: RequestOutput, finals: Finals, now_s: float) -> None:
        """Keep a finished request until `take`."""
        if not self._held:
            self._since_s = now_s
        self._held.append((output, finals))

    def is_due(self, now_s: float) -> bool:
        """Whether the first one held has waited long enough."""
        return bool(self._held) and now_s - self._since_s >= LONGEST_HOLD_S

    def take(self) -> list[RequestOutput]:
        """All requests that are held, with their rows."""
        held, self._held = self._held, []
        self.fill(held)
        return [output for output, _ in held]

    def fill(self, outputs: list[tuple[RequestOutput, Finals]]) -> None:
        """Make the rows of these requests now."""
        finals = [final for _, kept in outputs for final in kept.values()]
        if finals:
            rows = iter(self._project(np.stack(finals)))
            for output, kept in outputs:
                output.captured.update((index, next(rows)) for index in kept)
