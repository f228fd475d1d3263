"""What a load run is asked to do, checked when built. Knows nothing of how it is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from isologit.bench.dialects import DIALECTS, Dialect
from isologit.errors import ConfigError
from isologit.workload.dataset import DatasetFormat

DEFAULT_PORT = 8835
_GOODPUT_METRICS = ("ttft", "tpot", "e2el")
_NUM_BUILTIN = 1500

Backend = Literal["llm-serving", "openai", "openai-chat", "tgi"]
DatasetName = Literal["builtin", "alpaca", "custom"]
Metric = Literal["ttft", "tpot", "itl", "e2el"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class ServingOptions:
    """Everything `isologit bench serve` can be told; names as in vLLM. Raises ConfigError for what means nothing.

    `num_prompts` None takes all of a file, or 1500 built-in prompts; `test_time` seconds at `request_rate` is another
    way to say it. `request_timeout`: seconds one request may take once it is sent. `goodput` maps ttft, tpot or e2el to
    milliseconds. `seed` is of arrivals and of built-in prompts.
    """

    backend: Backend = "llm-serving"
    base_url: str | None = None
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    endpoint: str | None = None
    model: str | None = None
    served_model_name: str | None = None
    tokenizer: Path | None = None
    dataset_name: DatasetName | None = None
    dataset_path: Path | None = None
    dataset_format: DatasetFormat = "auto"
    num_prompts: int | None = None
    test_time: float | None = None
    max_new_tokens: int = 128
    request_rate: float = math.inf
    burstiness: float = 1.0
    contest_arrivals: bool = False
    arrival_trace: Path | None = None
    max_concurrency: int | None = None
    seed: int = 0
    num_warmups: int = 1
    ignore_eos: bool = False
    request_timeout: float | None = None
    percentile_metrics: tuple[Metric, ...] = METRICS
    metric_percentiles: tuple[float, ...] = (50.0, 90.0, 95.0, 99.0)
    goodput: Mapping[str, float] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("num_prompts", 1), ("max_concurrency", 1), ("max_new_tokens", 1), ("num_warmups", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{_option(name)} must be at least {least}, not {value}")
        if self.request_timeout is not None and not 0 < self.request_timeout < math.inf:
            raise ConfigError(f"--request-timeout must be a number of seconds above 0, not {self.request_timeout:g}")
        if self.seed < 0:
            raise ConfigError(f"--seed must not be negative, not {self.seed}")
        if not self.request_rate > 0 or not self.burstiness > 0:
            raise ConfigError("--request-rate and --burstiness must be above 0")
        self._check_address()
        if self.dataset_name in ("alpaca", "custom") and self.dataset_path is None:
            raise ConfigError(f"--dataset-name {self.dataset_name} needs a file; name it with --dataset-path")
        if self.dataset_name == "builtin" and self.dataset_path is not None:
            raise ConfigError("--dataset-name builtin takes no --dataset-path; leave one of them out")
        if self.contest_arrivals and self.arrival_trace is not None:
            raise ConfigError("--contest-arrivals and --arrival-trace exclude each other; give one")
        if self.arrival_trace is not None and not math.isinf(self.request_rate):
            raise ConfigError("--arrival-trace says when requests are sent; leave out --request-rate")
        if self.test_time is not None:
            self._check_test_time(self.test_time)
        if self.ignore_eos and not self.dialect.can_ignore_eos:
            raise ConfigError(f"--backend {self.backend} has no way to ask for --ignore-eos; leave it out")
        for percentile in self.metric_percentiles:
            if not 0 <= percentile <= 100:
                raise ConfigError(f"--metric-percentiles must lie between 0 and 100, not {percentile:g}")
        for name, limit in self.goodput.items():
            if name not in _GOODPUT_METRICS or not 0 < limit < math.inf:
                raise ConfigError(
                    f'--goodput takes {", ".join(_GOODPUT_METRICS)} with milliseconds above 0, not "{name}:{limit:g}"'
                )

    def _check_address(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port must lie between 1 and 65535, not {self.port}")
        try:
            parts = urlsplit(self.server_url)
            complete = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            complete = False
        if not complete:
            raise ConfigError(
                f'the server\'s address "{self.server_url}" is not one; write it like http://127.0.0.1:8835'
            )

    def _check_test_time(self, seconds: float) -> None:
        if self.num_prompts is not None:
            raise ConfigError("--test-time and --num-prompts both say how many requests; give one")
        if not 0 < seconds < math.inf:
            raise ConfigError(f"--test-time must be a number of seconds above 0, not {seconds:g}")
        if math.isinf(self.request_rate):
            raise ConfigError("--test-time needs a finite --request-rate: together they say how many requests")
        if seconds * self.request_rate < 1:
            raise ConfigError("--test-time times --request-rate must come to at least one request")

    @property
    def dialect(self) -> Dialect:
        """The protocol of `backend`."""
        return DIALECTS[self.backend]

    @property
    def server_url(self) -> str:
        """Scheme, host and port, and whatever path the endpoint comes behind.

        Clients of OpenAI's API are given an address that ends in /v1, which the endpoint begins with.
        """
        if self.base_url is None:
            host = f"[{self.host}]" if ":" in self.host else self.host
            return f"http://{host}:{self.port}"
        url = self.base_url.rstrip("/").removesuffix("/v1")
        return url if "://" in url else f"http://{url}"

    @property
    def wanted_requests(self) -> int | None:
        """How many requests; None is all of the file."""
        if self.test_time is not None:
            return int(self.test_time * self.request_rate)
        return self.num_prompts or (_NUM_BUILTIN if self.dataset_path is None else None)

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON without the key; an infinite number is `inf`."""
        found = {name: value for name, value in asdict(self).items() if name != "api_key"}
        return {name: plain(value) for name, value in found.items()}


def plain(value: Any) -> Any:
    """The value as JSON has it: paths and infinite numbers become text."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return value


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
