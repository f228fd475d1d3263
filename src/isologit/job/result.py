"""`result.json`: one object with everything a run measured. Owns its keys; computes nothing but sums and ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isologit.common.environment import describe_environment
from isologit.common.memory import peak_resident_bytes
from isologit.engine.planner import Plan
from isologit.fidelity import Certificate
from isologit.job.baseline import Baseline
from isologit.job.engine import Engine
from isologit.job.journal import FinishedRequest
from isologit.job.memory_plan import MemoryPlan
from isologit.job.options import RunOptions
from isologit.job.preprocess import Prepared
from isologit.job.state import Segment

FORMAT_VERSION = 1


@dataclass(frozen=True)
class RunResult:
    """A finished run. `data` is what `result.json` holds."""

    folder: Path
    data: dict[str, Any]

    @property
    def valid(self) -> bool:
        """Whether the certificate says VALID."""
        return bool(self.data["certificate"]["verdict"] == "VALID")

    @property
    def num_failed(self) -> int:
        """Requests without an answer, whether they could never run or failed while running."""
        return int(self.data["totals"]["failed"])


@dataclass
class Clock:
    """Seconds of every stage. Loading, warm-up, baseline and certificate are outside of the run's time."""

    load_s: float = 0.0
    warm_up_s: float = 0.0
    postprocess_s: float = 0.0
    baseline_s: float = 0.0
    certificate_s: float = 0.0


@dataclass
class Findings:
    """What the stages of a run hand to its result."""

    options: RunOptions
    prepared: Prepared
    finished: Mapping[str, FinishedRequest]
    segments: Sequence[Segment]
    steps: Sequence[Mapping[str, Any]]
    clock: Clock
    hashes: Mapping[str, str]
    capture: Mapping[str, Any]
    engine_facts: Mapping[str, Any]
    plan: Plan | None
    memory: MemoryPlan
    baseline: Baseline | None = None
    no_baseline: str | None = None
    profile: Mapping[str, Any] | None = None


def build_result(found: Findings, certificate: Certificate, engine: Engine, folder: Path) -> RunResult:
    """Put everything together."""
    options, clock = found.options, found.clock
    completed = [request for request in found.finished.values() if request.completed]
    requests = len(found.prepared.order)
    prompt_tokens = sum(len(request.prompt_token_ids) for request in completed)
    output_tokens = sum(len(request.token_ids) for request in completed)
    preprocess_s = sum(segment.preprocess_s for segment in found.segments)
    inference_s = inference_seconds(found.segments)
    config = engine.config
    data = {
        "format_version": FORMAT_VERSION,
        "status": "complete",
        "mode": options.mode,
        "seed": options.engine.seed,
        "started_at": found.segments[0].started_at,
        "output": str(folder),
        "totals": {
            "requests": requests,
            "completed": len(completed),
            "failed": requests - len(completed),
            "refused": len(found.prepared.refused),
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "total_s": preprocess_s + inference_s + clock.postprocess_s,
            "preprocess_s": preprocess_s,
            "inference_s": inference_s,
            "postprocess_s": clock.postprocess_s,
            "requests_per_s": len(completed) / inference_s,
            "output_tokens_per_s": output_tokens / inference_s,
            "tokens_per_s": (prompt_tokens + output_tokens) / inference_s,
        },
        "outside_total": {k: v for k, v in asdict(clock).items() if k != "postprocess_s"},
        "segments": [asdict(segment) for segment in found.segments],
        "steps": summarise_steps(found.steps),
        "plan": _plan(found, inference_s),
        "profile": found.profile,
        "baseline": None if found.baseline is None else found.baseline.to_dict(),
        "no_baseline": found.no_baseline,
        "memory": {**found.memory.to_dict(), "peak_bytes": peak_resident_bytes()},
        "certificate": _verdict(certificate),
        "capture": dict(found.capture),
        "model": {
            "name": model_name(options),
            "kind": engine.checkpoint.kind,
            "dtype": config.dtype,
            "num_parameters": config.num_parameters,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "context": config.context_length,
        },
        "dataset": {"name": dataset_name(options), "limit": options.limit, "requests": requests},
        "engine": dict(found.engine_facts),
        "environment": describe_environment(),
        "hashes": dict(found.hashes),
        "options": options.to_dict(),
    }
    return RunResult(folder, data)


def inference_seconds(segments: Sequence[Segment]) -> float:
    """Time of all segments."""
    return sum(segment.inference_s or 0.0 for segment in segments)


def model_name(options: RunOptions) -> str:
    """What people call the model."""
    if options.engine.model is None:
        return "built-in demo"
    return Path(options.engine.model).resolve().name if Path(options.engine.model).exists() else options.engine.model


def dataset_name(options: RunOptions) -> str:
    """What people call the prompts."""
    return "built-in prompts" if options.dataset_file is None else options.dataset_file.name


def summarise_steps(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the time of the steps went, and what drafts were worth."""
    count = len(steps)

    def total(name: str) -> float:
        return float(sum(step[name] for step in steps))

    busy = sum(step["end_s"] - step["start_s"] for step in steps)
    drafts, accepted = total("num_draft_tokens"), total("num_accepted_tokens")
    return {
        "count": count,
        "mean_tokens": total("num_tokens") / count if count else None,
        "mean_seqs": total("num_seqs") / count if count else None,
        "schedule_s": total("schedule_s"),
        "execute_s": total("execute_s"),
        "commit_s": busy - total("schedule_s") - total("execute_s"),
        "draft_tokens": int(drafts),
        "accepted_draft_tokens": int(accepted),
        "draft_acceptance": accepted / drafts if drafts else None,
    }


def _plan(found: Findings, inference_s: float) -> dict[str, Any] | None:
    """The planner's prediction beside the outcome; only a run in one piece can be held against it."""
    if found.plan is None or len(found.segments) != 1:
        return None
    return {
        "predicted_steps": found.plan.predicted_steps,
        "steps": len(found.steps),
        "predicted_s": found.plan.predicted_seconds,
        "inference_s": inference_s,
        "max_num_seqs": found.plan.max_num_seqs,
        "max_num_batched_tokens": found.plan.max_num_batched_tokens,
    }


def _verdict(certificate: Certificate) -> dict[str, Any]:
    greedy = certificate.greedy
    return {
        **certificate.verdict.to_dict(),
        "rescored": certificate.requests.rescored,
        "captured_rows": certificate.captured.rows,
        "max_abs": certificate.to_dict()["captured"]["max_abs"],
        "tokens_checked": None if greedy is None else greedy.tokens,
        "ties": None if greedy is None else greedy.ties,
    }
