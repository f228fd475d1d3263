"""When requests are sent: ascending seconds after the start. Knows no request and no clock."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isologit.errors import ConfigError, DatasetError
from isologit.workload.text_file import read_text

Seconds = npt.NDArray[np.float64]


def random_arrivals(n: int, request_rate: float, *, burstiness: float = 1.0, seed: int = 0) -> Seconds:
    """`n` arrival times with gamma-distributed gaps of mean 1 / `request_rate` (requests per second); the first is 0.

    `burstiness` is the gamma distribution's shape, as in vLLM: 1 is a Poisson process, less is burstier, more is more
    even, infinite is a constant gap. An infinite rate sends all at once. Raises ConfigError for values not above 0.
    """
    if not request_rate > 0:
        raise ConfigError(f"--request-rate must be above 0 (inf sends all at once), not {request_rate:g}")
    if not burstiness > 0:
        raise ConfigError(f"--burstiness must be above 0 (1 is a Poisson process), not {burstiness:g}")
    if math.isinf(request_rate):
        return np.zeros(n)
    if math.isinf(burstiness):
        return np.arange(n) / request_rate
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (request_rate * burstiness), n - 1)
    return _after_start(gaps)


def contest_arrivals(n: int, request_rate: float, *, seed: int = 0) -> Seconds:
    """The contest's load: gaps of a Poisson-distributed whole number of milliseconds around 1 / `request_rate`.

    As in the original, that mean is first rounded to hundredths of a second, so every rate above 200 sends all at
    once and 150 sends 100 a second. The gaps hardly vary: this is not a Poisson process. Only the seed is ours.
    """
    if not request_rate > 0:
        raise ConfigError(f"--request-rate must be above 0, not {request_rate:g}")
    mean_ms = round(1 / request_rate, 2) * 1000
    return _after_start(np.random.default_rng(seed).poisson(mean_ms, n - 1) / 1000)


def trace_arrivals(path: Path, n: int) -> Seconds:
    """The first `n` times of a file: a number of seconds a line, or a JSON object a line with `timestamp` in seconds.

    Only differences count: the first becomes 0. Raises DatasetError for fewer times, bad lines or descending times.
    """
    times: list[float] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        if len(times) == n:
            break
        time_s = _trace_time(line)
        if time_s is None:
            raise DatasetError(f'{path}:{number}: neither a number of seconds nor an object with "timestamp"')
        if times and time_s < times[-1]:
            raise DatasetError(f"{path}:{number}: {time_s:g} comes after {times[-1]:g}; sort the times")
        times.append(time_s)
    if len(times) < n:
        raise DatasetError(f"{path}: {len(times)} times for {n} requests; lower --num-prompts")
    return np.array(times) - times[0]


def _trace_time(line: str) -> float | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if isinstance(value, dict):
        value = value.get("timestamp")
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def _after_start(gaps: Seconds) -> Seconds:
    return np.concatenate([[0.0], np.cumsum(gaps)])
