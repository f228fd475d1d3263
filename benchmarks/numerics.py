"""What each scheme of tensor-core products costs and how far its logits are from float64, emulated on a CPU.

    python benchmarks/numerics.py --model llama2-7b --output benchmarks/results/numerics-llama2-7b.json

Weights are float16, so they are exact inputs of a tensor core; what a scheme rounds are activations, keys and values.
Residual stream, norms, softmax, rotary embedding and accumulation are float32 in every scheme. One layer's weights are
in memory at a time, and every scheme carries its own residual stream through it. The head is scaled until the largest
logit is about `--largest`. `--outliers` gives a few channels of every norm a large gain, as trained models have them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from isologit.backends.rope import rope_inv_freq
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.config import ModelConfig, load_model_config

MATRICES = ("qkv", "out", "gate_up", "down", "head")
_OUTLIER_GAIN, _OUTLIER_SHARE = 20.0, 0.002


def float32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, in] x [out, in] -> [T, out], no rounding but the arithmetic's."""
    return x @ weight.T


def float16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Activations rounded to float16."""
    return x.half().float() @ weight.T


def tf32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Activations rounded to a mantissa of 10 bits, as the TF32 mode does."""
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return rounded @ weight.T


def split(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Activations as the sum of two float16 terms: two products with the same weights."""
    high = x.half().float()
    return high @ weight.T + (x - high).half().float() @ weight.T


def _cut(x: torch.Tensor) -> torch.Tensor:
    """float64 rounded towards zero to float32's 24 bits."""
    return (x.contiguous().view(torch.int64) & ~((1 << 29) - 1)).view(torch.float64)


def split_cut(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`split` with sums as tensor cores make them: 16 products at a time, cut off instead of rounded."""
    high = x.half().double()
    low = (x - x.half().float()).half().double()
    w = weight.double()
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    for k in range(0, x.shape[1], 64):
        for term in (high, low):
            for first in range(k, min(k + 64, x.shape[1]), 16):
                columns = slice(first, first + 16)
                total = _cut(total + term[:, columns] @ w[:, columns].T)
    return total.float()


def _to_e4m3(x: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Rounded to FP8 e4m3 after scaling by a power of two to its range, whole or along `dim`; scaled back."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(448 / largest.clamp_min(1e-30))))
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


def split8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A float16 term, and what it leaves in FP8 with an FP8 copy of the weights."""
    high = x.half().float()
    return high @ weight.T + _to_e4m3(x - high, 1) @ _to_e4m3(weight, None).T


def bfloat16x3(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Both sides as two bfloat16 terms, without the product of the two low ones."""
    x_high, w_high = x.bfloat16().float(), weight.bfloat16().float()
    x_low, w_low = (x - x_high).bfloat16().float(), (weight - w_high).bfloat16().float()
    return x_high @ w_high.T + (x_low @ w_high.T + x_high @ w_low.T)


@dataclass(frozen=True)
class Product:
    """flops: relative to one float16 product, at the rates of a Hopper GPU. weight_bytes: of a parameter."""

    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    flops: float
    weight_bytes: float


PRODUCTS = {
    "float16": Product(float16, 1.0, 2),
    "tf32": Product(tf32, 2.0, 4),
    "split8": Product(split8, 1.5, 3),
    "split": Product(split, 2.0, 2),
    "split, sums cut off": Product(split_cut, 2.0, 2),
    "bfloat16x3": Product(bfloat16x3, 3.0, 4),
    "float32": Product(float32, 16.0, 4),
}
KV_ROUNDING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float16": lambda x: x.half().float(),
    "float16+e4m3": lambda x: x.half().float() + _to_e4m3(x - x.half().float(), -1),
    "float32": lambda x: x,
}
KV_BYTES = {"float16": 2, "float16+e4m3": 3, "float32": 4}


@dataclass(frozen=True)
class Scheme:
    """A product for every matrix (one for all but those named in `except_for`), and how keys and values are kept."""

    product: str
    kv: str = "float32"
    except_for: tuple[tuple[str, str], ...] = ()
    queries: str = "float32"  # queries and attention weights, inputs of attention's own products

    @property
    def name(self) -> str:
        """As the table shows it."""
        mixed = ", ".join(f"{matrix} {product}" for matrix, product in self.except_for)
        attention = "" if self.queries == "float32" else f"; attention inputs {self.queries}"
        return self.product + (f" ({mixed})" if mixed else "") + f"; kv {self.kv}" + attention

    def of(self, matrix: str) -> Product:
        """The product used for a matrix."""
        return PRODUCTS[dict(self.except_for).get(matrix, self.product)]


def _mixed(matrices: tuple[str, ...], product: str) -> tuple[tuple[str, str], ...]:
    return tuple((matrix, product) for matrix in matrices)


SCHEMES = (
    Scheme("float32"),
    Scheme("float32", "float16+e4m3"),
    Scheme("float32", "float16"),
    Scheme("float32", "float32", queries="float16"),
    Scheme("float16"),
    Scheme("float16", "float16", queries="float16"),
    Scheme("tf32"),
    Scheme("float16", except_for=_mixed(("head",), "split")),
    Scheme("float16", except_for=_mixed(("out", "down", "head"), "split")),
    Scheme("float16", except_for=_mixed(("gate_up", "down", "head"), "split8")),
    Scheme("split8"),
    Scheme("split8", "float16+e4m3"),
    Scheme("split8", "float16"),
    Scheme("split"),
    Scheme("split", "float16+e4m3"),
    Scheme("split", "float16"),
    Scheme("bfloat16x3"),
)


CUT_SCHEMES = (Scheme("split"), Scheme("split, sums cut off"), Scheme("split, sums cut off", "float16+e4m3"))


def _sizes(config: ModelConfig) -> dict[str, int]:
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    layers, hidden = config.num_hidden_layers, config.hidden_size
    return {
        "qkv": layers * hidden * heads,
        "out": layers * hidden * config.num_attention_heads * config.head_dim,
        "gate_up": layers * hidden * 2 * config.intermediate_size,
        "down": layers * hidden * config.intermediate_size,
        "head": hidden * config.vocab_size,
    }


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[S, L, heads, D] with cos and sin [L, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


class Emulation:
    """One scheme's (or, with None, float64's) residual stream, [S * L, hidden]."""

    def __init__(self, config: ModelConfig, scheme: Scheme | None, length: int) -> None:
        self.config, self.scheme, self.length = config, scheme, length
        self.dtype = torch.float64 if scheme is None else torch.float32
        self.x = torch.empty(0)

    def product(self, matrix: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`matrix`'s product as the scheme computes it."""
        return x @ weight.to(x.dtype).T if self.scheme is None else self.scheme.of(matrix).compute(x, weight)

    def attention(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[S * L, qkv features] -> [S * L, heads * D], causal within each sequence."""
        c = self.config
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q, k, v = qkv.view(-1, self.length, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 2)
        q, k = _rotate(q, cos, sin) / math.sqrt(dim), _rotate(k, cos, sin)
        if self.scheme is not None:
            keep, fed = KV_ROUNDING[self.scheme.kv], KV_ROUNDING[self.scheme.queries]
            q, k, v = fed(q), keep(k), keep(v)
        k, v = (part.repeat_interleave(heads // kv_heads, 2) for part in (k, v))
        scores = torch.einsum("slhd,smhd->shlm", q, k)
        scores = scores.masked_fill(torch.ones(self.length, self.length).triu(1).bool(), -math.inf).softmax(-1)
        if self.scheme is not None:
            scores = KV_ROUNDING[self.scheme.queries](scores)
        return torch.einsum("shlm,smhd->slhd", scores, v).flatten(2).flatten(0, 1)

    def layer(self, weights: dict[str, torch.Tensor], cos: torch.Tensor, sin: torch.Tensor) -> None:
        """One decoder layer."""
        eps = self.config.rms_norm_eps
        qkv = self.product("qkv", _norm(self.x, weights["input_norm"], eps), weights["qkv"])
        self.x = self.x + self.product("out", self.attention(qkv, cos, sin), weights["out"])
        gate, up = self.product("gate_up", _norm(self.x, weights["post_norm"], eps), weights["gate_up"]).chunk(2, 1)
        self.x = self.x + self.product("down", torch.nn.functional.silu(gate) * up, weights["down"])


def _with_outliers(weight: torch.Tensor) -> torch.Tensor:
    """A norm's weight with a few large channels, the same for every norm."""
    chosen = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))
    weight = weight.clone()
    weight[chosen[: max(1, int(len(weight) * _OUTLIER_SHARE))]] *= _OUTLIER_GAIN
    return weight


def measure(
    config: ModelConfig,
    schemes: Sequence[Scheme],
    *,
    sequences: int,
    length: int,
    largest: float,
    outliers: bool,
    seed: int,
) -> tuple[list[dict[str, object]], float]:
    """A row for each scheme, and the largest |logit| seen."""
    tensors = dummy_checkpoint(config, seed=seed, dtype="float16").tensors

    def norm(name: str) -> torch.Tensor:
        weight = tensors[name].float()
        return _with_outliers(weight) if outliers else weight

    tokens = torch.randint(3, config.vocab_size, (sequences * length,), generator=torch.Generator().manual_seed(seed))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rope_inv_freq(config))
    cos, sin = angles.cos(), angles.sin()
    exact = Emulation(config, None, length)
    emulations = [exact, *(Emulation(config, scheme, length) for scheme in schemes)]
    embedded = tensors["model.embed_tokens.weight"][tokens]
    for emulation in emulations:
        emulation.x = embedded.to(emulation.dtype)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."

        def get(*names: str, prefix: str = prefix) -> torch.Tensor:
            return torch.cat([tensors[f"{prefix}{name}_proj.weight"] for name in names]).float()

        weights = {
            "qkv": get("self_attn.q", "self_attn.k", "self_attn.v"),
            "out": get("self_attn.o"),
            "gate_up": get("mlp.gate", "mlp.up"),
            "down": get("mlp.down"),
            "input_norm": norm(f"{prefix}input_layernorm.weight"),
            "post_norm": norm(f"{prefix}post_attention_layernorm.weight"),
        }
        for emulation in emulations:
            emulation.layer(weights, cos, sin)
        print(f"layer {layer + 1} of {config.num_hidden_layers}", flush=True)
    head = tensors["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"].float()
    final_norm = norm("model.norm.weight")
    normed = _norm(exact.x, final_norm, config.rms_norm_eps)
    head = (head * (largest / (normed.float() @ head.T).abs().max())).half().float()
    truth = normed @ head.double().T
    rows: list[dict[str, object]] = []
    sizes, spread = _sizes(config), float(truth.std())
    for emulation in emulations[1:]:
        scheme = emulation.scheme
        assert scheme is not None
        logits = emulation.product("head", _norm(emulation.x, final_norm, config.rms_norm_eps), head)
        error = (logits.double() - truth).abs()
        total = sum(sizes.values())
        rows.append(
            {
                "scheme": scheme.name,
                "max_abs_error": float(error.max()),
                "rms_error": float(error.pow(2).mean().sqrt()),
                "flops_vs_float16": sum(n * scheme.of(m).flops for m, n in sizes.items()) / total,
                "weight_bytes_vs_float16": sum(n * scheme.of(m).weight_bytes for m, n in sizes.items()) / (2 * total),
                "kv_bytes_vs_float16": KV_BYTES[scheme.kv] / 2,
                "same_argmax": bool((logits.argmax(1) == truth.argmax(1)).all()),
            }
        )
    print(f"standard deviation of the logits {spread:.2f}")
    return rows, float(truth.abs().max())


def main() -> None:
    """Print a Markdown table and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int, help="scale the preset down to this hidden size")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--largest", type=float, default=30.0)
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--cut-sums", action="store_true", help="only the schemes with sums cut off (slow)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config = load_model_config(args.model)
    if args.layers:
        config = replace(config, num_hidden_layers=args.layers)
    if args.hidden:
        heads = args.hidden // config.head_dim
        wide = config.intermediate_size * args.hidden // config.hidden_size
        config = replace(
            config,
            hidden_size=args.hidden,
            intermediate_size=wide,
            num_attention_heads=heads,
            num_key_value_heads=heads,
        )
    with torch.inference_mode():
        rows, largest = measure(
            config,
            CUT_SCHEMES if args.cut_sums else SCHEMES,
            sequences=args.sequences,
            length=args.length,
            largest=args.largest,
            outliers=args.outliers,
            seed=args.seed,
        )
    print("| scheme | max abs error | rms error | FLOP | weight bytes | KV bytes | argmax |\n" + "|---" * 7 + "|")
    for row in rows:
        print(
            f"| {row['scheme']} | {row['max_abs_error']:.2e} | {row['rms_error']:.2e} | "
            f"{row['flops_vs_float16']:.2f} | {row['weight_bytes_vs_float16']:.2f} | "
            f"{row['kv_bytes_vs_float16']:.2f} | {'same' if row['same_argmax'] else 'differs'} |"
        )
    if args.output:
        result = {
            "benchmark": "numerics",
            "model": args.model,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "rows": args.sequences * args.length,
            "outliers": args.outliers,
            "seed": args.seed,
            "largest_logit": largest,
            "schemes": rows,
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
