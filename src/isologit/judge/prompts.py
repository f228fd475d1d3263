"""The prompts of a round and their order, drawn from its seed: timed ones, secret ones, and copies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isologit.errors import ConfigError
from isologit.judge.evidence import RunKind
from isologit.judge.profile import Profile
from isologit.judge.seeds import RoundSeed
from isologit.text.tokenizer import Tokenizer
from isologit.workload import builtin_requests
from isologit.workload.dataset import load_dataset
from isologit.workload.requests import RequestSpec

Request = tuple[str, str, int]
"""(id, prompt, max_tokens)."""
_COPIES = 8


@dataclass(frozen=True)
class RoundPrompts:
    """Prompts by kind of run. timed: in the dataset's order. secret: others, with the first timed ones' lengths."""

    timed: list[Request]
    secret: list[Request]
    held_out: int
    twins: int

    def of(self, kind: RunKind, seed: RoundSeed, run: str) -> list[Request]:
        """The requests of one run in the order in which they are sent, each with an id of its own."""
        if kind == "timed":
            chosen = self.timed
        elif kind == "held-out":
            chosen = self.secret
        elif kind == "twins":
            several = self.timed[: max(1, -(-self.twins // _COPIES))]
            chosen = [
                (f"{several[i % len(several)][0]}c{i}", *several[i % len(several)][1:]) for i in range(self.twins)
            ]
        else:
            chosen = self.timed[: self.held_out]
        order = seed.generator("order", run).permutation(len(chosen))
        return [chosen[i] for i in order]


def draw_prompts(profile: Profile, seed: RoundSeed, tokenizer: Tokenizer) -> RoundPrompts:
    """The prompts of a round. Raises ConfigError when the dataset has too few, DatasetError when it cannot be read.

    Built-in prompts are drawn anew for each round. Of a file the timed prompts are the first ones, as the contest's
    rules have it, and the secret ones are drawn from the rest; without a rest, the timed ones' words are shuffled,
    so that lengths stay.
    """
    wanted = profile.prompts
    if wanted.dataset == "builtin":
        first, second = (int(x) for x in seed.generator("prompts").integers(1, 1 << 30, 2))
        timed = _requests(builtin_requests(wanted.count, first))
        secret = _requests(builtin_requests(wanted.held_out, second))
    else:
        found = load_dataset(Path(wanted.dataset), tokenizer, default_max_new_tokens=128)
        good = _requests([spec for spec in found if isinstance(spec, RequestSpec)])
        if len(good) < wanted.count:
            raise ConfigError(f"{wanted.dataset}: holds {len(good)} usable prompts; {wanted.count} are asked for")
        timed, rest = good[: wanted.count], good[wanted.count :]
        generator = seed.generator("prompts")
        if len(rest) >= wanted.held_out:
            picked = generator.choice(len(rest), wanted.held_out, replace=False)
            secret = [rest[i] for i in picked]
        else:
            secret = [_shuffled(request, generator) for request in timed[: wanted.held_out]]
    secret = [(f"h{i}", prompt, limit) for i, (_, prompt, limit) in enumerate(secret)]
    return RoundPrompts(timed, secret, min(wanted.held_out, len(timed)), wanted.twins)


def _requests(specs: list[RequestSpec]) -> list[Request]:
    return [(spec.id, spec.prompt, spec.max_new_tokens) for spec in specs if spec.prompt is not None]


def _shuffled(request: Request, generator: np.random.Generator) -> Request:
    name, prompt, limit = request
    words = prompt.split(" ")
    return name, " ".join(words[i] for i in generator.permutation(len(words))), limit
