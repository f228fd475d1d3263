"""The shape of a LLaMA model: read from Hugging Face's `config.json`, checked once, frozen. Knows no tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isologit.errors import ConfigError, ModelError

ARCHITECTURE = "LlamaForCausalLM"
DTYPES = ("float16", "bfloat16", "float32")
_DTYPE_ALIASES = {"half": "float16", "float": "float32", "double": "float32", "float64": "float32", "auto": "float32"}
_SILU_NAMES = ("silu", "swish")
_ROPE_TYPES = ("linear", "llama3")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: "linear" divides all by `factor`; "llama3" only the slow ones.

    The last three fields belong to "llama3": wavelengths above `original_max_position_embeddings / low_freq_factor`
    are divided by `factor`, those below `original_max_position_embeddings / high_freq_factor` stay, and those between
    are blended.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in _ROPE_TYPES:
            raise ConfigError(
                f'rope_scaling type "{self.rope_type}" is not supported; only "linear" and "llama3" (or none) are'
            )
        if not self.factor >= 1.0:
            raise ConfigError(f"rope_scaling factor must be at least 1, not {self.factor}")
        if not 0.0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling needs 0 < low_freq_factor < high_freq_factor, "
                f"not {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.original_max_position_embeddings < 1:
            raise ConfigError("rope_scaling original_max_position_embeddings must be at least 1")

    def to_hf_dict(self) -> dict[str, Any]:
        """The value of `rope_scaling` in a `config.json`."""
        if self.rope_type == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
        }


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a LLaMA model that is not a weight. Sizes count elements; `dtype` is that of the stored weights.

    `eos_token_ids` may be empty. With `attention_bias` the four attention products have a bias, with `mlp_bias` the
    three of the feed-forward layer. With `tie_word_embeddings` there is no `lm_head.weight`: the embedding serves.
    Raises ConfigError when the fields do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ConfigError(f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads ({heads})")
        if heads % kv_heads:
            raise ConfigError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for the rotary embedding, not {self.head_dim}")
        if not self.rms_norm_eps > 0.0:
            raise ConfigError(f"rms_norm_eps must be positive, not {self.rms_norm_eps}")
        if not self.rope_theta > 0.0:
            raise ConfigError(f"rope_theta must be positive, not {self.rope_theta}")
        if self.dtype not in DTYPES:
            raise ConfigError(f'dtype "{self.dtype}" is not supported; use one of {", ".join(DTYPES)}')

    @classmethod
    def from_hf_dict(cls, d: Mapping[str, Any], source: str | Path) -> ModelConfig:
        """Read the dictionary of a Hugging Face `config.json`; `source` names the file in messages.

        Missing optional fields take the defaults of transformers' `LlamaConfig`. Raises ModelError for another
        architecture, a feature that is not supported, or a field that is missing or invalid.
        """
        fields = _Fields(d, source)
        _refuse_other_models(fields)
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        rope_theta, rope_scaling = _read_rope(fields)
        bos, eos, pad = fields.token_ids("bos_token_id", 1), fields.eos_token_ids(), fields.token_ids("pad_token_id")
        try:
            return cls(
                vocab_size=fields.integer("vocab_size"),
                hidden_size=hidden,
                intermediate_size=fields.integer("intermediate_size"),
                num_hidden_layers=fields.integer("num_hidden_layers"),
                num_attention_heads=heads,
                num_key_value_heads=fields.integer("num_key_value_heads", heads),
                head_dim=fields.integer("head_dim", hidden // max(heads, 1)),
                max_position_embeddings=fields.integer("max_position_embeddings", 2048),
                rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
                rope_theta=rope_theta,
                rope_scaling=rope_scaling,
                tie_word_embeddings=fields.boolean("tie_word_embeddings"),
                attention_bias=fields.boolean("attention_bias"),
                mlp_bias=fields.boolean("mlp_bias"),
                bos_token_id=bos[0] if bos else None,
                eos_token_ids=eos,
                pad_token_id=pad[0] if pad else None,
                dtype=_dtype(fields.text("dtype", fields.text("torch_dtype", "float32"))),
            )
        except ConfigError as error:
            raise ModelError(f"{source}: {error}") from None

    @property
    def context_length(self) -> int:
        """Most tokens of one sequence: `max_position_embeddings`, which a "linear" scaling stretches by its factor."""
        scaling = self.rope_scaling
        factor = scaling.factor if scaling is not None and scaling.rope_type == "linear" else 1.0
        return int(self.max_position_embeddings * factor)

    def to_hf_dict(self) -> dict[str, Any]:
        """A `config.json` dictionary: `LlamaConfig(**config.to_hf_dict())` works and `from_hf_dict` reads it back."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            **{name: getattr(self, name) for name in _SIZES},
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_hf_dict(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": _one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "dtype": self.dtype,
        }

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that take part in products for every token: all matrices with the output head, no lookups."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key)
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + feed_forward) + self.vocab_size * self.hidden_size

    def product_flop(self, tokens: int, logits: int) -> int:
        """FLOP of the products that a step of `tokens` tokens, `logits` of them with logits, cannot do without.

        The other tokens end at the last layer's keys and values.
        """
        query = self.num_attention_heads * self.head_dim
        rest = self.hidden_size * (2 * query + 3 * self.intermediate_size + self.vocab_size)
        return 2 * (self.num_matmul_parameters * tokens - rest * (tokens - logits))

    @property
    def num_parameters(self) -> int:
        """Stored weights; a tied embedding is counted once."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        per_layer = 2 * self.hidden_size  # two norm weights
        if self.attention_bias:
            per_layer += query + 2 * key + self.hidden_size
        if self.mlp_bias:
            per_layer += 2 * self.intermediate_size + self.hidden_size
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.num_matmul_parameters + embedding + self.num_hidden_layers * per_layer + self.hidden_size

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON of `to_hf_dict()`."""
        text = json.dumps(self.to_hf_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object. Raises ModelError naming the file, and the line when it is malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: is not UTF-8 text; copy the file again") from None
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path}, line {error.lineno}: is not valid JSON ({error.msg}); fix it or copy it again"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


class _Fields:
    """Typed access to a configuration dictionary; every error names the source and the field."""

    def __init__(self, d: Mapping[str, Any], source: str | Path) -> None:
        self.d = d
        self.source = source

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.source}: {message}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.d.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{name} is missing; a LLaMA config needs it")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{name} must be an integer, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.d.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{name} is missing; this kind of rope_scaling needs it")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{name} must be a number, not {value!r}")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.d.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, not {value!r}")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.d.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(f"{name} must be a string, not {value!r}")
        return value

    def token_ids(self, name: str, default: int | None = None) -> tuple[int, ...]:
        """Zero or more ids. An explicit null means none; so does -1, which some converters write."""
        value = self.d.get(name, default)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
            raise self.error(f"{name} must be an integer or a list of integers, not {value!r}")
        return tuple(i for i in listed if i >= 0)

    def eos_token_ids(self) -> tuple[int, ...]:
        return self.token_ids("eos_token_id", 2)


def _dtype(name: str) -> str:
    """torch's name of a type as one of ours.

    Weights have types of their own, so one that is only said here does no harm; a float64 weight is refused itself.
    """
    name = name.removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else list(ids)


def _refuse_other_models(fields: _Fields) -> None:
    architectures, model_type = fields.d.get("architectures"), fields.d.get("model_type")
    if architectures is not None and not (isinstance(architectures, list) and ARCHITECTURE in architectures):
        names = ", ".join(map(str, architectures)) if isinstance(architectures, list) and architectures else None
        raise fields.error(f"{names or repr(architectures)} is not supported; only {ARCHITECTURE} is")
    if model_type is None and architectures is None:
        raise fields.error(f'names no model; it needs "architectures": ["{ARCHITECTURE}"] or "model_type": "llama"')
    if model_type not in (None, "llama"):
        raise fields.error(f'model_type "{model_type}" is not supported; only "llama" is')
    if (activation := fields.text("hidden_act", "silu")) not in _SILU_NAMES:
        raise fields.error(f'hidden_act "{activation}" is not supported; only "silu" (or "swish", its other name) is')
    if fields.d.get("quantization_config") is not None:
        raise fields.error("quantized weights are not supported; save the model in float16, bfloat16 or float32")


def _read_rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(fields.d.get(name), dict | None):
            raise fields.error(f"{name} must be an object or null, not {fields.d[name]!r}")
    name = "rope_scaling" if fields.d.get("rope_scaling") else "rope_parameters"  # as transformers when both are given
    rope = _Fields(fields.d.get(name) or {}, f"{fields.source}: {name}")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise fields.error("partial_rotary_factor other than 1 is not supported; LLaMA rotates the whole head")
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    if rope_type == "default":
        return theta, None
    factor = rope.number("factor") if rope_type in _ROPE_TYPES else 1.0
    try:
        if rope_type != "llama3":
            return theta, RopeScaling(rope_type, factor)
        return theta, RopeScaling(
            rope_type,
            factor,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position_embeddings=fields.integer(
                "original_max_position_embeddings",  # beside the others it comes first, in transformers too
                rope.integer("original_max_position_embeddings", fields.integer("max_position_embeddings", 2048)),
            ),
        )
    except ConfigError as error:
        raise fields.error(str(error)) from None
