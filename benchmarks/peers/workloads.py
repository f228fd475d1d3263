"""What the systems are given: prompts of random token ids with the contest's lengths, and a few other shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from isologit.config import PRESETS
from isologit.workload import contest_lengths

Lengths = list[tuple[int, int]]
"""(prompt tokens, output tokens) of each request."""

_WARM_UP_REQUESTS, _WARM_UP_TOKENS = 32, 4
_WARM_UP_PROMPT_TOKENS = 4096  # of all together
_FIRST_ORDINARY_TOKEN = 3  # 0 to 2 are the unknown, begin and end tokens of the shapes used here
_BEGIN = 1


@dataclass(frozen=True)
class Workload:
    """A name, the preset whose shape is run, and the lengths of the requests."""

    name: str
    preset: str
    lengths: Callable[[], Lengths]
    what: str


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("trace300", "llama-110m", lambda: contest_lengths()[:300], "the contest's first 300 lengths"),
        Workload("trace1500", "llama-110m", contest_lengths, "the contest's 1500 lengths"),
        Workload("tiny64", "tinyllama-1.1b", lambda: contest_lengths()[:64], "the contest's first 64 lengths"),
        Workload("latency", "llama-110m", lambda: [(32, 128)], "one request alone, 32 prompt and 128 output tokens"),
        Workload("long", "llama-110m", lambda: [(2048, 1)] * 8, "8 prompts of 2048 tokens, 1 output token each"),
    )
}


def random_requests(lengths: Lengths, vocab_size: int, seed: int) -> list[dict[str, Any]]:
    """Requests as adapters read them, with prompts that share nothing but the begin token."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt_token_ids": [_BEGIN, *rng.integers(_FIRST_ORDINARY_TOKEN, vocab_size, prompt - 1).tolist()],
            "max_tokens": output,
        }
        for prompt, output in lengths
    ]


def workload_file(workload: Workload, lengths: Lengths, seed: int) -> dict[str, Any]:
    """The requests and, from another seed, a few short ones to warm up with; the model and settings are added later."""
    vocab_size = PRESETS[workload.preset].vocab_size
    count = min(_WARM_UP_REQUESTS, max(1, _WARM_UP_PROMPT_TOKENS // max(prompt for prompt, _ in lengths)))
    warm_up = [(prompt, min(output, _WARM_UP_TOKENS)) for prompt, output in lengths[:count]]
    return {
        "requests": random_requests(lengths, vocab_size, seed),
        "warm_up": random_requests(warm_up, vocab_size, seed + 1),
    }
