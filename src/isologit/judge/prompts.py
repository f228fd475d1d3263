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
_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class RoundPrompts:
    """Prompts by kind of run. timed: in the dataset's order. secret: others, as many and with the timed ones' lengths.
    warm_up: more of the secret ones, in no other run.

    All runs have the same number of requests with ids that are drawn anew, so that an entry cannot tell a run that is
    ranked from one that is only checked.
    """

    timed: list[Request]
    secret: list[Request]
    warm_up: list[Request]

    def of(self, kind: RunKind, seed: RoundSeed, run: str) -> list[Request]:
        """The requests of one run in the order in which they are sent, each with an id that only this run has."""
        chosen = self.secret if kind == "held-out" else self.timed
        if kind == "twins":
            several = self.timed[: -(-len(self.timed) // _COPIES)]
            chosen = [several[i % len(several)] for i in range(len(self.timed))]
        order = seed.generator("order", run).permutation(len(chosen))
        return [(_id(seed, run, place), *chosen[i][1:]) for place, i in enumerate(order)]

    def of_warm_up(self, seed: RoundSeed, run: str) -> list[Request]:
        """Short requests that are sent before the clock starts. They say nothing about the run's own."""
        return [
            (_id(seed, run, -1 - place), prompt, min(limit, _WARM_UP_TOKENS))
            for place, (_, prompt, limit) in enumerate(self.warm_up)
        ]


def _id(seed: RoundSeed, run: str, place: int) -> str:
    return seed.derive("id", run, place).hex()[:16]


def draw_prompts(profile: Profile, seed: RoundSeed, tokenizer: Tokenizer) -> RoundPrompts:
    """The prompts of a round. Raises ConfigError when the dataset has too few, DatasetError when it cannot be read.

    Built-in prompts are drawn anew for each round. Of a file the timed prompts are the first ones, as the contest's
    rules have it, and the secret ones are drawn from the rest; without a rest, the timed ones' words are shuffled,
    so that lengths stay.
    """
    wanted, warm_up = profile.prompts, profile.load.warm_up
    secrets = wanted.count + warm_up
    if wanted.dataset == "builtin":
        # NOTE: seeds of 256 bits: the warm-up's prompts must not allow to try out all seeds, and so to know the rest.
        timed = _requests(builtin_requests(wanted.count, _integer(seed, "timed")))
        secret = _requests(builtin_requests(wanted.count, _integer(seed, "secret")))
        secret += _requests(builtin_requests(warm_up, _integer(seed, "warm-up")))
    else:
        found = load_dataset(Path(wanted.dataset), tokenizer, default_max_new_tokens=128)
        good = _requests([spec for spec in found if isinstance(spec, RequestSpec)])
        if len(good) < wanted.count:
            raise ConfigError(f"{wanted.dataset}: holds {len(good)} usable prompts; {wanted.count} are asked for")
        timed, rest = good[: wanted.count], good[wanted.count :]
        generator = seed.generator("prompts")
        if len(rest) >= secrets:
            secret = [rest[i] for i in generator.choice(len(rest), secrets, replace=False)]
        else:
            secret = [_shuffled(timed[i % len(timed)], generator) for i in range(secrets)]
    return RoundPrompts(timed, secret[: wanted.count], secret[wanted.count :])


def _integer(seed: RoundSeed, name: str) -> int:
    return int.from_bytes(seed.derive("prompts", name), "little")


def _requests(specs: list[RequestSpec]) -> list[Request]:
    return [(spec.id, spec.prompt, spec.max_new_tokens) for spec in specs if spec.prompt is not None]


def _shuffled(request: Request, generator: np.random.Generator) -> Request:
    name, prompt, limit = request
    words = prompt.split(" ")
    return name, " ".join(words[i] for i in generator.permutation(len(words))), limit
