"""The baseline: the same requests, one at a time, through plain transformers, against the engine on them alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isologit.common.progress import Observer, Progress
from isologit.engine.request import GenerationRequest
from isologit.job.engine import Engine, TimedReference
from isologit.job.threads import fastest_thread_count, torch_threads

_CALIBRATION_TOKENS = 6


@dataclass(frozen=True)
class Baseline:
    """Both times are measured, on the same requests.

    engine_run: "main" when the sample is everything and the main run's inference is its time, else "alone".
    equal_outputs: requests whose tokens the baseline and the main run agree on. engine_repeats: requests whose tokens
    the engine gave again when it ran the sample alone (None when it did not run again). threads: the number the
    baseline is fastest with.
    """

    requests: int
    of: int
    output_tokens: int
    seconds: float
    engine_s: float
    engine_run: str
    equal_outputs: int
    engine_repeats: int | None
    threads: int
    seed: int

    @property
    def speedup(self) -> float:
        """How many times faster the engine is."""
        return self.seconds / self.engine_s

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return {
            "what": "Hugging Face transformers, eager, float32, one request at a time, on these same requests",
            "requests": self.requests,
            "of": self.of,
            "output_tokens": self.output_tokens,
            "seconds": self.seconds,
            "engine_s": self.engine_s,
            "engine_run": self.engine_run,
            "speedup": self.speedup,
            "equal_outputs": self.equal_outputs,
            "engine_repeats": self.engine_repeats,
            "threads": self.threads,
            "sample_seed": self.seed,
        }


def draw_sample(requests: Sequence[GenerationRequest], size: int | None, seed: int) -> list[GenerationRequest]:
    """`size` requests drawn evenly (None: all), in the order given."""
    if size is None or size >= len(requests):
        return list(requests)
    chosen = np.random.default_rng(seed).choice(len(requests), size, replace=False)
    return [requests[i] for i in sorted(chosen.tolist())]


def measure_baseline(
    completed: Sequence[GenerationRequest],
    tokens: Mapping[str, list[int]],
    engine: Engine,
    reference: TimedReference,
    observer: Observer,
    *,
    size: int | None,
    seed: int,
    main_inference_s: float,
) -> Baseline:
    """Time the sample through both. tokens: what the main run gave, by request id. `completed` must not be empty.

    Under replay both are forced to the same tokens and compute everything.
    """
    sample = draw_sample(completed, size, seed)
    everything = len(sample) == len(completed)
    if everything:
        engine_s, repeats = main_inference_s, None
    else:
        engine_s, repeats = _time_engine(sample, tokens, engine)
    eos = engine.config.eos_token_ids
    prompt = sample[len(sample) // 2].prompt_token_ids
    threads = fastest_thread_count(lambda: reference.generate(prompt, _CALIBRATION_TOKENS, ()), engine.num_threads)
    seconds, equal = 0.0, 0
    for done, request in enumerate(sample, 1):
        start = time.perf_counter()
        with torch_threads(threads):
            output = reference.generate(
                request.prompt_token_ids,
                request.params.max_tokens,
                eos,
                ignore_eos=request.params.ignore_eos,
                forced=request.replay_token_ids,
            )
        seconds += time.perf_counter() - start
        equal += output == tokens[request.request_id]
        observer.progress(Progress(done, len(sample), done / len(sample)))
    return Baseline(
        requests=len(sample),
        of=len(completed),
        output_tokens=sum(len(tokens[request.request_id]) for request in sample),
        seconds=seconds,
        engine_s=engine_s,
        engine_run="main" if everything else "alone",
        equal_outputs=equal,
        engine_repeats=repeats,
        threads=threads,
        seed=seed,
    )


def _time_engine(
    sample: Sequence[GenerationRequest], tokens: Mapping[str, list[int]], engine: Engine
) -> tuple[float, int]:
    """Seconds of the engine on the sample alone, from an empty prefix cache, and how many outputs it gave again."""
    plain = [replace(request, capture=frozenset()) for request in sample]
    start = time.perf_counter()
    outputs = list(engine.run(plain))
    seconds = time.perf_counter() - start
    return seconds, sum(output.token_ids == tokens[output.request_id] for output in outputs)
