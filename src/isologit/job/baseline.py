"""The baseline: the same requests, one at a time, through plain transformers, against the engine on them alone.

Which requests is decided while the engine is still there, by what they are predicted to take; the engine runs them
alone, leaves memory, and only then transformers' model is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from isologit.common.progress import Observer, Progress
from isologit.config import ModelConfig
from isologit.engine.request import GenerationRequest
from isologit.job.engine import Engine, TimedBaseline
from isologit.job.threads import fastest_thread_count, torch_threads

_CALIBRATION_PROMPT, _CALIBRATION_TOKENS = 8, 6
_PROBE_ROWS = 32  # of a product, as a prompt has them
_PROBE_REPEATS = 3
_LAYER_S = 3e-4  # of Python and small operations in a layer's step, on a typical core


@dataclass(frozen=True)
class Baseline:
    """Both times are measured, on the same requests.

    dtype: what transformers computed in. engine_run: "main" when the sample is everything and the main run's inference
    is its time, else "alone". equal_outputs: requests whose tokens the baseline and the main run agree on.
    engine_repeats: requests whose tokens the engine gave again when it ran the sample alone (None when it did not run
    again). threads: the number the baseline is fastest with. asked_for: requests that were asked for; fewer are timed
    when more are predicted to take longer than budget_s.
    """

    requests: int
    of: int
    asked_for: int
    output_tokens: int
    seconds: float
    engine_s: float
    engine_run: str
    equal_outputs: int
    engine_repeats: int | None
    threads: int
    seed: int
    dtype: str
    budget_s: float

    @property
    def speedup(self) -> float:
        """How many times faster the engine is."""
        return self.seconds / self.engine_s

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return {
            "what": f"Hugging Face transformers, eager, {self.dtype}, one request at a time, on these same requests",
            "dtype": self.dtype,
            "requests": self.requests,
            "of": self.of,
            "asked_for": self.asked_for,
            "budget_s": self.budget_s,
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


@dataclass(frozen=True)
class EngineTime:
    """The sample and what the engine took for it; see `Baseline`."""

    sample: list[GenerationRequest]
    of: int
    asked_for: int
    seconds: float
    run: str
    repeats: int | None


def time_engine(
    completed: Sequence[GenerationRequest],
    tokens: Mapping[str, list[int]],
    engine: Engine,
    predict: Callable[[GenerationRequest], float],
    *,
    size: int | None,
    seed: int,
    budget_s: float,
    main_inference_s: float,
) -> EngineTime | None:
    """Choose the sample and run it alone through the engine. tokens: what the main run gave, by request id.

    predict: seconds that the baseline needs for a request. The sample is cut where the budget is used up; if not even
    its first request fits, it is the quickest of all; None if that does not fit either. Under replay both are forced to
    the same tokens and compute everything.
    """
    drawn = draw_sample(completed, size, seed)
    sample = affordable(drawn, predict, budget_s) or affordable(sorted(completed, key=predict)[:1], predict, budget_s)
    if not sample:
        return None
    if len(sample) == len(completed):
        return EngineTime(sample, len(completed), len(drawn), main_inference_s, "main", None)
    plain = [replace(request, capture=frozenset()) for request in sample]
    start = time.perf_counter()
    outputs = list(engine.run(plain))
    seconds = time.perf_counter() - start
    repeats = sum(output.token_ids == tokens[output.request_id] for output in outputs)
    return EngineTime(sample, len(completed), len(drawn), seconds, "alone", repeats)


def affordable(
    requests: Sequence[GenerationRequest], predict: Callable[[GenerationRequest], float], budget_s: float
) -> list[GenerationRequest]:
    """The first requests that are predicted to take no longer than the budget together."""
    ends = np.cumsum([predict(request) for request in requests])
    return list(requests[: int(np.searchsorted(ends, budget_s, side="right"))])


def measure_baseline(
    engine_time: EngineTime,
    tokens: Mapping[str, list[int]],
    reference: TimedBaseline,
    observer: Observer,
    *,
    dtype: str,
    eos_token_ids: Sequence[int],
    most_threads: int,
    seed: int,
    budget_s: float,
) -> Baseline:
    """Time the sample through transformers, on the number of threads it is fastest with."""
    sample = engine_time.sample
    prompt = sample[len(sample) // 2].prompt_token_ids[:_CALIBRATION_PROMPT]
    threads = fastest_thread_count(lambda: reference.generate(prompt, _CALIBRATION_TOKENS, ()), most_threads)
    expected = sum(len(tokens[request.request_id]) for request in sample)
    seconds, equal, made = 0.0, 0, 0
    for done, request in enumerate(sample):

        def tell(count: int, done: int = done, made: int = made) -> None:
            observer.progress(Progress(done, len(sample), min(1.0, (made + count) / expected), made + count))

        start = time.perf_counter()
        with torch_threads(threads):
            output = reference.generate(
                request.prompt_token_ids,
                request.params.max_tokens,
                eos_token_ids,
                ignore_eos=request.params.ignore_eos,
                forced=request.replay_token_ids,
                on_token=tell,
            )
        seconds += time.perf_counter() - start
        made += len(output)
        equal += output == tokens[request.request_id]
    return Baseline(
        requests=len(sample),
        of=engine_time.of,
        asked_for=engine_time.asked_for,
        output_tokens=expected,
        seconds=seconds,
        engine_s=engine_time.seconds,
        engine_run=engine_time.run,
        equal_outputs=equal,
        engine_repeats=engine_time.repeats,
        threads=threads,
        seed=seed,
        dtype=dtype,
        budget_s=budget_s,
    )


class BaselineSpeed:
    """What transformers is predicted to take, from a product of the model's shape in the baseline's dtype.

    NOTE: in float16 a CPU's library may be ten times slower than in float32, which no data sheet tells.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, num_threads: int) -> None:
        weight = torch.ones(config.intermediate_size, config.hidden_size, dtype=dtype)
        with torch_threads(num_threads), torch.inference_mode():
            one, many = (_product_seconds(weight, rows) for rows in (1, _PROBE_ROWS))
        products = config.num_matmul_parameters / weight.numel()
        overhead = _LAYER_S * config.num_hidden_layers
        self._token_s = one * products + overhead
        self._prompt_token_s = many / _PROBE_ROWS * products

    def seconds(self, num_prompt_tokens: int, num_output_tokens: int) -> float:
        """Of one request."""
        return self._prompt_token_s * num_prompt_tokens + self._token_s * num_output_tokens


def _product_seconds(weight: torch.Tensor, rows: int) -> float:
    x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
    seconds = []
    for _ in range(_PROBE_REPEATS):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
