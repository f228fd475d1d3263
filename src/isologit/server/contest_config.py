"""The contest's server YAML: what its keys mean here, and which of them mean nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from isologit.errors import ConfigError

_MINDIR = "MindIR graphs are not read; weights come from model_config.model_cfg_path"
_BATCHES = "a step takes whatever is there; see --max-num-seqs and --max-num-batched-tokens"
_OF_MODEL = "the model says it itself"
_CPU = "there is one process on the CPU; see --threads"
_BLOCKS = "key/value blocks are counted from the memory there is"
_FED = "prompts are fed as they are"
_IGNORED = {
    "model_config.end_token": _OF_MODEL,
    "model_config.pad_token_id": _OF_MODEL,
    "model_config.vocab_size": _OF_MODEL,
    "model_config.model_dtype": _OF_MODEL,
    "model_config.model_type": _MINDIR,
    "model_config.zactivate_len": _MINDIR,
    "model_config.current_index": _MINDIR,
    "model_config.backend": "there is one backend",
    "model_config.page_attention": "keys and values are always paged",
    "model_config.batching_strategy": "batching is always continuous",
    "model_config.seq_type": "nothing is padded",
    "model_config.prefill_batch_size": _BATCHES,
    "model_config.batch_waiting_time": _BATCHES,
    "model_config.decode_batch_waiting_time": _BATCHES,
    "serving_config.prefill_batch_waiting_time": _BATCHES,
    "serving_config.decode_batch_waiting_time": _BATCHES,
    "serving_config.agent_ports": _CPU,
    "serving_config.agent_ip": _CPU,
    "serving_config.start_device_id": _CPU,
    "serving_config.enable_host_post_sampling": _CPU,
    "pa_config.num_blocks": _BLOCKS,
    "pa_config.block_size": _BLOCKS,
    "pa_config.decode_seq_length": _BLOCKS,
    "tokenizer.type": "the tokenizer's file says it itself",
}
_IGNORED_SECTIONS = {"model_path": _MINDIR, "basic_inputs": _FED, "extra_inputs": _FED, "warmup_inputs": _FED}
_TYPO = 0.85  # likeness from which on an unknown key is taken for a misspelt one


@dataclass
class ContestConfig:
    """What a contest YAML asks for; None where it says nothing. `ignored`: one line for each key without effect.

    model_config: the MindFormers YAML with the model's config, wherever the checkpoint lies.
    """

    model: Path | None = None
    model_config: Path | None = None
    tokenizer: Path | None = None
    name: str | None = None
    host: str | None = None
    port: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    ignored: list[str] = field(default_factory=list)


def load_contest_config(path: Path) -> ContestConfig:
    """Read the YAML and the MindFormers YAML it points to.

    Raises ConfigError when a file is missing or malformed, a value has the wrong type, or a key is misspelt.
    """
    found = ContestConfig()
    lengths = []
    for key, value in _leaves(path, _read(path)):
        where = f"{path}: {key}"
        if key not in _KNOWN:
            found.ignored.append(f"{key} has no effect: {_why_ignored(path, key)}")
        elif key == "model_config.model_name":
            found.name = _text(where, value)
        elif key == "model_config.decode_batch_size":
            found.max_num_seqs = max(_whole_numbers(where, value))
        elif key == "model_config.seq_length":
            lengths.append(_whole_numbers(where, value)[-1])  # the others are widths to pad to
        elif key == "model_config.max_generate_length":
            lengths.append(_whole_number(where, value))
        elif key == "model_config.model_cfg_path":
            found.model, found.model_config = _checkpoint(_beside(path, _text(where, value)))
        elif key == "serving_config.server_ip":
            found.host = _text(where, value)
        elif key == "serving_config.server_port":
            found.port = _whole_number(where, value)
        elif key == "tokenizer.vocab_file":
            found.tokenizer = _beside(path, _text(where, value))
    found.max_model_len = min(lengths, default=None)
    return found


_KNOWN = (
    "model_config.model_name",
    "model_config.decode_batch_size",
    "model_config.seq_length",
    "model_config.max_generate_length",
    "model_config.model_cfg_path",
    "serving_config.server_ip",
    "serving_config.server_port",
    "tokenizer.vocab_file",
)


def _why_ignored(path: Path, key: str) -> str:
    """Raises ConfigError for a key that looks like a misspelt one: left out in silence, it would change the server."""
    known = _IGNORED.get(key) or _IGNORED_SECTIONS.get(key.split(".", 1)[0])
    if known is not None:
        return known
    close = difflib.get_close_matches(key, [*_KNOWN, *_IGNORED], n=1, cutoff=_TYPO)
    if close:
        raise ConfigError(f"{path}: there is no key {key}; did you mean {close[0]}?")
    return "it is not one of the contest's keys"


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


def _leaves(path: Path, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, content in tree.items():
        if isinstance(content, dict):
            yield from ((f"{section}.{key}", value) for key, value in content.items())
        elif section in _SECTIONS and content is not None:
            raise ConfigError(f"{path}: {section} must be a section with keys, not {content!r}")
        elif content is not None:
            yield str(section), content


_SECTIONS = {key.split(".", 1)[0] for key in (*_KNOWN, *_IGNORED)}


def _whole_number(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where} must be a whole number of at least 1, not {value!r}")
    return value


def _whole_numbers(where: str, value: Any) -> list[int]:
    """One number, or a list of them."""
    if value == []:
        raise ConfigError(f"{where} is an empty list; give a whole number of at least 1")
    return [_whole_number(where, number) for number in (value if isinstance(value, list) else [value])]


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where} must be text, not {value!r}")
    return value


def _beside(path: Path, name: str) -> Path:
    """A path as seen from the YAML's folder, or else as it is."""
    beside = path.parent / name
    return beside if beside.exists() or not Path(name).exists() else Path(name)


def _checkpoint(path: Path) -> tuple[Path, Path | None]:
    """The checkpoint a MindFormers YAML names, or that YAML's folder; and the YAML, if it has the model's config."""
    tree = _read(path)
    inner: Any = tree
    for key in ("model", "model_config"):
        inner = inner.get(key) if isinstance(inner, dict) else None
    config = path if isinstance(inner, dict) else None
    named = tree.get("load_checkpoint")
    if named:
        return _beside(path, _text(f"{path}: load_checkpoint", named)), config
    # NOTE: MindFormers also takes the name of a model to fetch here.
    named = inner.get("checkpoint_name_or_path") if isinstance(inner, dict) else None
    beside = _beside(path, named) if isinstance(named, str) and named else None
    return (beside if beside is not None and beside.exists() else path.parent), config
