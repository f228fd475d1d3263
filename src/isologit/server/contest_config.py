"""The contest's server YAML: what its keys mean here, and which of them mean nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from isologit.errors import ConfigError

_IGNORED = {
    "model_config.prefill_batch_size": "prompts are fed by tokens; see --max-num-batched-tokens",
    "pa_config": "key/value blocks are counted from the memory there is",
}


@dataclass
class ContestConfig:
    """What a contest YAML asks for; None where it says nothing. `ignored`: one line for each key without effect."""

    model: Path | None = None
    tokenizer: Path | None = None
    name: str | None = None
    host: str | None = None
    port: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    vocab_size: int | None = None
    ignored: list[str] = field(default_factory=list)


def load_contest_config(path: Path) -> ContestConfig:
    """Read the YAML and the MindFormers YAML it points to.

    Raises ConfigError when a file is missing or malformed, or a value has the wrong type.
    """
    tree = _read(path)
    found = ContestConfig()
    for key, value in _leaves(tree):
        if key == "model_config.model_name":
            found.name = str(value)
        elif key == "model_config.decode_batch_size":
            found.max_num_seqs = _largest(path, key, value)
        elif key == "model_config.seq_length":
            found.max_model_len = _largest(path, key, value)
        elif key == "model_config.vocab_size":
            found.vocab_size = _largest(path, key, value)
        elif key == "model_config.model_cfg_path":
            found.model = _checkpoint(path, str(value))
        elif key == "serving_config.server_ip":
            found.host = str(value)
        elif key == "serving_config.server_port":
            found.port = _largest(path, key, value)
        elif key == "tokenizer.vocab_file":
            found.tokenizer = _beside(path, str(value))
        else:
            why = _IGNORED.get(key) or _IGNORED.get(key.split(".", 1)[0])
            found.ignored.append(f"{key} has no effect" + (f": {why}" if why else ""))
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: is not a mapping of sections such as model_config and serving_config")
    return tree


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, content in tree.items():
        if not isinstance(content, dict):
            yield str(section), content
            continue
        for key, value in content.items():
            yield f"{section}.{key}", value


def _largest(path: Path, key: str, value: Any) -> int:
    """The number, or the largest of a list of numbers."""
    numbers = value if isinstance(value, list) else [value]
    if not numbers or any(not isinstance(number, int) or isinstance(number, bool) or number < 1 for number in numbers):
        raise ConfigError(f"{path}: {key} must be a whole number of at least 1, or a list of them, not {value!r}")
    return int(max(numbers))


def _beside(path: Path, name: str) -> Path:
    """A path as it is, or as seen from the YAML's folder."""
    return Path(name) if Path(name).exists() else path.parent / name


def _checkpoint(path: Path, name: str) -> Path:
    """The checkpoint that the MindFormers YAML names, or that YAML's folder."""
    inner = _beside(path, name)
    named = _read(inner).get("load_checkpoint")
    return _beside(inner, str(named)) if named else inner.parent
