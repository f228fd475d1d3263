"""One object of engine options: validated, and the only place that defaults come from."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isologit.cli.bench_command import latency, throughput
from isologit.cli.run_command import run_command
from isologit.cli.serve_command import serve_command
from isologit.config import EngineOptions, SpeculativeConfig, speculation
from isologit.errors import ConfigError
from isologit.job.options import RunOptions
from isologit.server.options import ServerOptions

DEFAULTS = EngineOptions()
COMMANDS: list[Callable[..., Any]] = [run_command, serve_command, throughput, latency]
EXPECTED = {
    "speculative_tokens": DEFAULTS.num_speculative_tokens,
    "draft_model": DEFAULTS.draft_model,
    "max_num_seqs": DEFAULTS.max_num_seqs,
    "max_num_batched_tokens": DEFAULTS.max_num_batched_tokens,
    "enable_prefix_caching": DEFAULTS.enable_prefix_caching,
    "order": "longest-first",
    "load_format": DEFAULTS.load_format,
    "qkv_layout": DEFAULTS.qkv_layout,
    "threads": DEFAULTS.num_threads,
    "seed": DEFAULTS.seed,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_defaults_of_the_options(command: Callable[..., Any]) -> None:
    for name, parameter in inspect.signature(command).parameters.items():
        if name in EXPECTED:
            assert parameter.default == EXPECTED[name], name
    assert "speculative_tokens" in inspect.signature(command).parameters


def test_run_and_serve_hold_the_same_options() -> None:
    assert RunOptions().engine == ServerOptions().engine == DEFAULTS
    assert DEFAULTS.num_speculative_tokens == SpeculativeConfig().num_speculative_tokens > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be at least 1"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be at least 1"),
        ({"num_threads": -1}, "num_threads must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, "every running request needs one token"),
        ({"load_format": "none"}, 'use "auto" or "dummy"'),
        ({"load_format": "dummy"}, "needs a model"),
        ({"logprobs_mode": "percent"}, 'use "raw_logprobs" or "raw_logits"'),
    ],
)
def test_senseless_options_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**fields)


def test_speculation_as_the_command_line_words_it() -> None:
    assert speculation(0) is None
    assert speculation(3) == SpeculativeConfig(num_speculative_tokens=3)
    assert EngineOptions(speculative_config=speculation(3, "small")).draft_model == "small"
    assert EngineOptions(speculative_config=None).num_speculative_tokens == 0
    with pytest.raises(ConfigError, match="drafts nothing"):
        speculation(0, "small")
    with pytest.raises(ConfigError, match="between 1 and 64, not -1"):
        speculation(-1)


def test_options_become_pure_json() -> None:
    options = EngineOptions(model="m", tokenizer=Path("t"), speculative_config=None)
    assert json.loads(json.dumps(options.to_dict()))["tokenizer"] == "t"
    assert json.loads(json.dumps(RunOptions(engine=options).to_dict()))["tokenizer"] == "t"


@pytest.mark.parametrize("module", ["model_config", "presets", "engine_options"])
def test_no_module_of_config_needs_a_later_import(module: str) -> None:
    """An import circle would show as an import inside a function."""
    source = Path(sys.modules["isologit.config"].__file__ or "").with_name(f"{module}.py").read_text()
    assert "    from isologit" not in source
    subprocess.run([sys.executable, "-c", f"import isologit.config.{module}"], check=True)
