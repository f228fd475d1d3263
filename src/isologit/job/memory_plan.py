"""What a run will hold in memory, stage by stage, before the first byte is loaded; and which proof there is room for.

Owns the arithmetic and the choice between the whole reference, the streamed one, and a baseline or none. It knows
shapes and lengths only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from isologit.backends.base import LoadOptions, Memory
from isologit.backends.registry import choose_backend
from isologit.common.memory import FreeMemory
from isologit.config import EngineOptions, ModelConfig
from isologit.engine.calibration import CALIBRATION_ROWS
from isologit.engine.kv_sizes import most_blocks, prepared_blocks, run_blocks
from isologit.engine.planner import StepCost, plan
from isologit.errors import ConfigError
from isologit.fidelity.magnitudes import KEEP
from isologit.fidelity.reference import NOISE_BATCH
from isologit.fidelity.streamed import STATES_BYTES

MIB, GIB = 1 << 20, 1 << 30
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Python, the libraries and compiled kernels, measured: of a run until transformers is loaded, and from then on.
_ENGINE_PROCESS, _PROOF_PROCESS = 420 * MIB, 570 * MIB
_LOADING = 96 * MIB  # blocks of weights on their way
_ON_HOST = ("process", "blocks", "captured rows", "figures")  # parts that no device holds
_FIGURE_BYTES = 32  # for each value compared, as long as their quantiles are exact
_KEPT_FREE = 256 * MIB  # never planned away: what other processes may need meanwhile
# A typical core; only the relation of its numbers matters, to foresee how many requests will run at once.
_BYTES_PER_S, _FLOP_PER_S, _STEP_S = 2e10, 2e11, 1e-4

Reference = Literal["whole", "streamed"]


@dataclass(frozen=True)
class Stage:
    """Bytes that are held at the same time, by what they are for."""

    name: str
    parts: dict[str, int]

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Room:
    """One memory: the stages in their order, each of which gives back what the next one does not list.

    allowed: bytes that this process may hold in all, and what sets that limit. smallest_change: of the command, that
    would make the run fit where it does not.
    """

    stages: tuple[Stage, ...]
    allowed: FreeMemory
    smallest_change: str

    @property
    def peak(self) -> Stage:
        """The stage that holds most."""
        return max(self.stages, key=lambda stage: stage.nbytes)

    @property
    def refusal(self) -> str | None:
        """Why the run cannot be made: the stage, what it needs, and the smallest change that would make it fit."""
        for stage in self.stages:
            lacking = stage.nbytes + _KEPT_FREE - self.allowed.nbytes
            if lacking > 0:
                largest, nbytes = max(stage.parts.items(), key=lambda part: part[1])
                return (
                    f"the run's stage {stage.name} needs {gib(stage.nbytes)} of memory ({gib(nbytes)} of it {largest}) "
                    f"and {self.allowed.limited_by} allows {gib(self.allowed.nbytes)}; free {gib(lacking)} more, or "
                    f"{self.smallest_change}"
                )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return {
            "planned_peak_bytes": self.peak.nbytes,
            "planned_peak_stage": self.peak.name,
            "allowed_bytes": self.allowed.nbytes,
            "allowed_by": self.allowed.limited_by,
            "stages": {stage.name: dict(stage.parts) for stage in self.stages},
        }


@dataclass(frozen=True)
class MemoryPlan:
    """What a run holds of the host's memory, and of the device's where that has its own (None where it has not).

    reference: how the certificate is made. baseline_dtype: None when no baseline is timed, for the reason in
    `no_baseline` (None when none was asked for).
    """

    host: Room
    device: Room | None
    reference: Reference
    baseline_dtype: str | None
    no_baseline: str | None

    @property
    def refusal(self) -> str | None:
        """Why the run cannot be made, None if it can."""
        return self.host.refusal or (None if self.device is None else self.device.refusal)

    def require_fits(self) -> None:
        """Raises ConfigError when the run cannot be made."""
        if self.refusal is not None:
            raise ConfigError(self.refusal)

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return {
            **self.host.to_dict(),
            "device": None if self.device is None else self.device.to_dict(),
            "reference": self.reference,
            "baseline_dtype": self.baseline_dtype,
            "no_baseline": self.no_baseline,
            "refusal": self.refusal,
        }


def gib(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / GIB:.2f} GiB"


def plan_memory(
    options: EngineOptions,
    config: ModelConfig,
    lengths: Sequence[tuple[int, int]],
    allowed: FreeMemory,
    *,
    num_threads: int,
    draft: ModelConfig | None = None,
    captured_rows: int = 0,
    baseline: bool = True,
) -> MemoryPlan:
    """The plan of a run of requests of these (prompt, most output) tokens, none of which is empty.

    draft: of the draft model, if there is one. captured_rows: logits rows that are kept. baseline: whether one is asked
    for.
    """
    engine = _Engine(options, config, draft, lengths, num_threads)
    limits = _Limits(allowed, engine.own_memory)
    row_bytes = 4 * config.vocab_size
    host_weights = engine.weights if limits.device is None else 0
    loading = Stage("load", {"process": _ENGINE_PROCESS, "weights": host_weights, "blocks": _LOADING})
    left = allowed.nbytes - loading.nbytes if limits.device is None else limits.device.nbytes - engine.weights
    held = {
        "weights": engine.weights,
        "keys and values": engine.kv_bytes(max(0, left)),
        "step buffers": engine.step_buffers,
    }
    host_held = held if limits.device is None else dict.fromkeys(held, 0)
    running = Stage(
        "run",
        {
            "process": _ENGINE_PROCESS,
            **host_held,
            "step buffers": host_held["step buffers"] + row_bytes * min(engine.rows, max(1, captured_rows)),
            "captured rows": row_bytes * captured_rows,
        },
    )
    proof = _Proof(config, lengths, captured_rows * row_bytes)
    fits = [dtype for dtype in ("float32", config.dtype) if limits.fit(proof.baseline(dtype))]
    dtype = fits[0] if fits and baseline else None
    no_baseline = None
    if baseline and dtype is None:
        needed, least = proof.baseline(config.dtype).nbytes + _KEPT_FREE, limits.least
        no_baseline = (
            f"no baseline will be timed: transformers needs {gib(needed)} for this model in {config.dtype} and "
            f"{least.limited_by} allows {gib(least.nbytes)}"
        )
    reference, certificate = proof.affordable(limits)
    proofs = [certificate] if dtype is None else [proof.baseline(dtype), certificate]
    change = "take a smaller model"
    if config.dtype == "float32":
        change = "store the model in 16 bits"
    if _fits(loading, allowed):
        change = "run shorter requests"
    host = Room((loading, running, *proofs), allowed, change)
    device = None
    if limits.device is not None:
        stages = (Stage("load", {"weights": engine.weights}), Stage("run", held), *map(_on_device, proofs))
        shorter = _fits(stages[0], limits.device)
        change = "run shorter requests" if shorter else "take a smaller model or another --device"
        device = Room(stages, limits.device, change)
    return MemoryPlan(host, device, reference, dtype, no_baseline)


def plan_certificate(
    config: ModelConfig, lengths: Sequence[tuple[int, int]], allowed: FreeMemory, *, captured_rows: int
) -> tuple[Reference, Stage]:
    """How a certificate alone is made on the host, and what it holds; the rest as in `plan_memory`."""
    return _Proof(config, lengths, 4 * config.vocab_size * captured_rows).affordable(_Limits(allowed))


def _fits(stage: Stage, allowed: FreeMemory) -> bool:
    return stage.nbytes + _KEPT_FREE <= allowed.nbytes


def _on_device(stage: Stage) -> Stage:
    """What a device holds of a stage in which transformers computes on it."""
    return Stage(stage.name, {name: nbytes for name, nbytes in stage.parts.items() if name not in _ON_HOST})


@dataclass(frozen=True)
class _Limits:
    """The memory of the host, and of the device if it has its own; transformers' model passes through the first."""

    host: FreeMemory
    device: FreeMemory | None = None

    def fit(self, stage: Stage) -> bool:
        """Whether both have room for a stage of transformers'."""
        return _fits(stage, self.host) and (self.device is None or _fits(_on_device(stage), self.device))

    @property
    def least(self) -> FreeMemory:
        """The smaller one."""
        return min([self.host, *([] if self.device is None else [self.device])], key=lambda room: room.nbytes)


class _Engine:
    """What the engine will hold of the memory that its device computes in: the same arithmetic as its own.

    own_memory: of a device that does not compute in the host's. weights, step_buffers: bytes. rows: of its largest
    step.
    """

    def __init__(
        self,
        options: EngineOptions,
        config: ModelConfig,
        draft: ModelConfig | None,
        lengths: Sequence[tuple[int, int]],
        num_threads: int,
    ) -> None:
        self._options = options
        self._lengths = lengths
        backend = choose_backend(options.backend, options.device)
        load = LoadOptions(config.context_length, num_threads, options.device, numerics=options.numerics)
        self._block_size: int = backend.block_size
        models = [config] if draft is None else [config, draft]
        self._memories: list[Memory] = [backend.plan_memory(model, load, 1) for model in models]
        self._block_bytes = sum(memory.kv_block for memory in self._memories)
        free = backend.own_memory(options.device)
        self.own_memory = None if free is None else FreeMemory(free, "the device")
        self.weights = sum(memory.weights for memory in self._memories)
        read_s = config.num_matmul_parameters * ITEM_BYTES[config.dtype] / _BYTES_PER_S
        cost = StepCost((0,), (_STEP_S + read_s,), 2 * config.num_matmul_parameters / _FLOP_PER_S)
        chosen = plan(
            lengths,
            num_blocks=max(self._needs()) + sum(self._needs()),
            block_size=self._block_size,
            cost=cost,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            longest_first=options.longest_first,
        )
        self._slots = chosen.max_num_seqs
        self.rows = max(CALIBRATION_ROWS[-1], chosen.max_num_batched_tokens)
        self.step_buffers = sum(backend.plan_memory(model, load, self.rows).step_buffers for model in models)

    def _needs(self) -> list[int]:
        return [-(-(prompt + output - 1) // self._block_size) for prompt, output in self._lengths]

    def kv_bytes(self, free: int) -> int:
        """Bytes of keys and values when so many are free once the model is loaded."""
        given = self._options.kv_cache_memory_bytes
        most = most_blocks(free, self._block_bytes, given)
        prepared = prepared_blocks(most, self._block_bytes, self._block_size, given)
        return self._block_bytes * max(
            min(CALIBRATION_ROWS[-1], most), prepared, run_blocks(self._needs(), self._slots, most)
        )


class _Proof:
    """What transformers will hold of the model, once the engine is gone."""

    def __init__(self, config: ModelConfig, lengths: Sequence[tuple[int, int]], captured: int) -> None:
        self._config = config
        self._captured = captured
        self._tokens = max(prompt + output for prompt, output in lengths)
        self._outputs = max(output for _, output in lengths)
        self._all_tokens = sum(prompt + output for prompt, output in lengths)

    def baseline(self, dtype: str) -> Stage:
        """The timed baseline, with its keys and values."""
        c, item = self._config, ITEM_BYTES[dtype]
        kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self._tokens * item
        parts = {
            "process": _PROOF_PROCESS,
            f"baseline in {dtype}": c.num_parameters * item,
            "baseline's keys and values": 2 * kv,
            "baseline's activations": self._activations(1) * item // 4,
        }
        return Stage("baseline", parts)

    def affordable(self, limits: _Limits) -> tuple[Reference, Stage]:
        """The whole reference, or the streamed one if that does not fit."""
        whole = self.certificate("whole")
        return ("whole", whole) if limits.fit(whole) else ("streamed", self.certificate("streamed"))

    def certificate(self, reference: Reference) -> Stage:
        """The whole reference, or two layers of the streamed one and all states, or its LM head and the rows."""
        c = self._config
        rows = 4 * c.vocab_size * self._outputs * (2 * NOISE_BATCH + 2)
        figures = _FIGURE_BYTES * min(KEEP, self._captured // 4)
        parts = {"process": _PROOF_PROCESS, "captured rows": self._captured, "figures": figures}
        if reference == "whole":
            parts["reference"] = 4 * c.num_parameters
            parts["reference's activations and rows"] = max(self._activations(NOISE_BATCH), rows)
            return Stage("certificate", parts)
        head = 4 * c.vocab_size * c.hidden_size
        layer = 4 * (c.num_parameters - (1 if c.tie_word_embeddings else 2) * head // 4) // c.num_hidden_layers
        stored = head * ITEM_BYTES[c.dtype] // 4
        states = min(STATES_BYTES, 4 * c.hidden_size * self._all_tokens) + 4 * c.hidden_size * 5 * self._tokens
        parts["streamed reference"] = max(2 * layer + self._activations(NOISE_BATCH), stored, head + stored + rows)
        parts["states of all requests"] = states
        return Stage("certificate", parts)

    def _activations(self, batch: int) -> int:
        """float32 bytes of what a layer works in: the products' inputs and outputs, and the scores of attention."""
        c = self._config
        rows = batch * self._tokens
        return 4 * rows * (3 * c.intermediate_size + 6 * c.hidden_size + 3 * c.num_attention_heads * self._tokens)
