"""The least time a workload can take on this machine, from what the machine was measured to do.

A step takes at least as long as its matrix products at the measured product rate, and at least as long as one pass over
the weights at the measured streaming rate. Attention, norms and everything else are left out, so the limit is below
what any engine can reach without speculation. Requests start longest first (Graham 1969).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isologit.config import ModelConfig
from isologit.job.machine import MachineLimits

_SLOTS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
_MEASURE = """
import json
from dataclasses import asdict
from isologit.job.machine import measure_limits
print(json.dumps(asdict(measure_limits())))
"""


def measure_rates(variables: Mapping[str, str]) -> MachineLimits:
    """Measure in a process of its own, so that no thread pool stays behind, with these variables in its environment."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE],
        cwd=root,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return MachineLimits(**json.loads(done.stdout))


def step_rows(lengths: Sequence[tuple[int, int]], slots: int) -> list[tuple[int, int]]:
    """(tokens computed, logits computed) of each step, requests started longest first in `slots` slots.

    A prompt is computed in the step it starts in and gives its first output token there.
    """
    queue = deque(sorted(lengths, key=lambda item: (-item[1], -item[0])))
    running: list[int] = []  # output tokens still to come
    steps = []
    while queue or running:
        tokens = len(running)
        while queue and len(running) < slots:
            prompt, output = queue.popleft()
            tokens += prompt
            running.append(output)
        steps.append((tokens, len(running)))
        running = [left - 1 for left in running if left > 1]
    return steps


def least_seconds(
    config: ModelConfig,
    lengths: Sequence[tuple[int, int]],
    rates: MachineLimits,
    bytes_per_weight: int,
    slots: Sequence[int] = _SLOTS,
) -> dict[str, Any]:
    """`limit_s` at the number of slots where it is least, with that number, the steps and the operations.

    It is what the library's product allows; `tile_limit_s` is the same at the rate of this engine's tile loop.
    """
    stream_s = config.num_matmul_parameters * bytes_per_weight / rates.bytes_per_s
    work = {
        count: [config.product_flop(tokens, logits) for tokens, logits in step_rows(lengths, count)] for count in slots
    }

    def limit(count: int, flops: float) -> float:
        return sum(max(operations / flops, stream_s) for operations in work[count])

    best = min(slots, key=lambda count: limit(count, rates.flops))
    return {
        "limit_s": limit(best, rates.flops),
        "tile_limit_s": min(limit(count, rates.tile_flops) for count in slots),
        "slots": best,
        "steps": len(work[best]),
        "flop": sum(work[best]),
        **asdict(rates),
    }
