"""The built-in demo model and prompts with the contest's length profile."""

from __future__ import annotations

import csv
import random
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path

import sentencepiece

from isologit.workload.requests import RequestSpec
from isologit.workload.textgen import Pair, pairs, sentence

DEMO_NAME = "isologit-demo"
"""The name under which a server of this project serves the demo model, so that others know it."""

_POOL = 6000  # instructions to choose from when a prompt of a given length is wanted
_PROMPT_SEED_OFFSET = 1_000_003  # prompts are drawn from other seeds than the training text


def demo_model_path() -> Path:
    """Folder of the demo model: config.json, model.safetensors, tokenizer.model."""
    return Path(str(files("isologit.workload").joinpath("demo_model")))


@cache
def contest_lengths() -> list[tuple[int, int]]:
    """(prompt tokens with BOS, max_new_tokens) of the contest's 1500 requests, in order."""
    source = files("isologit.workload").joinpath("data", "contest_lengths.csv")
    with source.open(encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [(int(row["prompt_tokens_with_bos"]), int(row["max_new_tokens"])) for row in rows]


def builtin_requests(n: int = 1500, seed: int = 0) -> list[RequestSpec]:
    """`n` generated prompts with the contest's lengths (cycled beyond 1500); another seed gives other prompts.

    A prompt has exactly the contest's number of demo-model tokens where it has at least 12 of them; shorter ones are
    the generated instruction closest in length.
    """
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(demo_model_path() / "tokenizer.model"))
    rng = random.Random(seed + _PROMPT_SEED_OFFSET)
    by_length: dict[int, list[Pair]] = {}
    pool = list(islice(pairs(seed + _PROMPT_SEED_OFFSET), _POOL))
    for pair, ids in zip(pool, tokenizer.encode([pair.instruction + "\n" for pair in pool]), strict=True):
        by_length.setdefault(len(ids) + 1, []).append(pair)
    lengths = contest_lengths()
    specs = []
    for index in range(n):
        wanted, max_new_tokens = lengths[index % len(lengths)]
        prompt = _prompt_of_length(wanted, by_length, tokenizer, rng)
        specs.append(RequestSpec(str(index), prompt, None, max_new_tokens, f"built-in request {index}"))
    return specs


def _prompt_of_length(
    wanted: int, by_length: dict[int, list[Pair]], tokenizer: sentencepiece.SentencePieceProcessor, rng: random.Random
) -> str:
    """A prompt of `wanted` tokens with BOS and the final line break, or the closest instruction there is."""
    if wanted <= max(by_length):
        closest = by_length[min(by_length, key=lambda length: abs(length - wanted))]
        kind = rng.choice(sorted({_kind(pair) for pair in closest}))  # all kinds of tasks are equally likely
        return rng.choice([pair for pair in closest if _kind(pair) == kind]).instruction + "\n"
    words = "Repeat the sentence 2 times:".split(" ")
    size = len(tokenizer.encode(" ".join(words) + "\n")) + 1
    while size < wanted:
        for word in sentence(rng).split(" "):
            size += len(tokenizer.encode(word))
            if size > wanted:
                break
            words.append(word)
    return " ".join(words) + "\n"


def _kind(pair: Pair) -> str:
    return pair.instruction.split(" ", 1)[0]
