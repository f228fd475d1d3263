"""Options that mean nothing are refused with the way out; the others say where and how much."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from isologit.bench.options import ServingOptions
from isologit.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_prompts": 0}, "--num-prompts must be at least 1"),
        ({"max_concurrency": 0}, "--max-concurrency"),
        ({"num_warmups": -1}, "--num-warmups"),
        ({"seed": -1}, "--seed"),
        ({"request_rate": 0.0}, "--request-rate"),
        ({"request_rate": math.nan}, "--request-rate"),
        ({"burstiness": -1.0}, "--burstiness"),
        ({"dataset_name": "alpaca"}, "--dataset-path"),
        ({"dataset_name": "builtin", "dataset_path": Path("x")}, "takes no --dataset-path"),
        ({"contest_arrivals": True, "arrival_trace": Path("x")}, "exclude each other"),
        ({"request_rate": 5.0, "arrival_trace": Path("x")}, "leave out --request-rate"),
        ({"test_time": 10.0}, "finite --request-rate"),
        ({"test_time": 10.0, "request_rate": 1.0, "num_prompts": 5}, "give one"),
        ({"test_time": 0.1, "request_rate": 1.0}, "at least one request"),
        ({"ignore_eos": True}, "llm-serving has no way"),
        ({"metric_percentiles": (101.0,)}, "between 0 and 100"),
        ({"goodput": {"itl": 5.0}}, "--goodput takes"),
        ({"goodput": {"ttft": 0.0}}, "--goodput takes"),
        ({"goodput": {"ttft": math.inf}}, "--goodput takes"),
        ({"test_time": math.nan, "request_rate": 1.0}, "--test-time must be"),
        ({"request_timeout": 0.0}, "--request-timeout must be"),
        ({"request_timeout": math.inf}, "--request-timeout must be"),
        ({"port": 99999}, "--port must lie"),
        ({"base_url": "http://here:port"}, "is not one"),
        ({"base_url": "ftp://here"}, "is not one"),
        ({"base_url": ":80"}, "is not one"),
    ],
)
def test_meaningless_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServingOptions(**given)


def test_the_contests_way_of_saying_how_many() -> None:
    assert ServingOptions(request_rate=150.0, test_time=10.0).wanted_requests == 1500
    assert ServingOptions(request_rate=0.625, test_time=2400.0).wanted_requests == 1500


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, "http://127.0.0.1:8835"),
        ({"host": "::1", "port": 9}, "http://[::1]:9"),
        ({"base_url": "https://somewhere:1/"}, "https://somewhere:1"),
        ({"base_url": "somewhere:1"}, "http://somewhere:1"),
        ({"base_url": "http://somewhere:1/v1/"}, "http://somewhere:1"),
        ({"base_url": "http://gateway/llm"}, "http://gateway/llm"),
    ],
)
def test_server_url(given: dict[str, Any], url: str) -> None:
    assert ServingOptions(**given).server_url == url


def test_the_key_is_never_saved_or_shown() -> None:
    options = ServingOptions(api_key="hidden")
    assert "hidden" not in json.dumps(options.to_dict(), allow_nan=False) + repr(options)
