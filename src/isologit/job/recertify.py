"""A finished run held against its model again, from the files in its folder alone: no engine, no state of the job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isologit.common.memory import FreeMemory, free_memory, resident_bytes
from isologit.common.progress import Observer, Silent
from isologit.common.verdict import Reason
from isologit.config import EngineOptions
from isologit.engine.request import GenerationRequest, SamplingParams
from isologit.errors import ConfigError, OutputFolderError
from isologit.fidelity import CAPTURES, Certificate, read_captures
from isologit.job.folder import CERTIFICATE, LOGITS, OUTPUTS, RESULT
from isologit.job.journal import FinishedRequest
from isologit.job.memory_plan import plan_certificate
from isologit.job.options import RunOptions
from isologit.job.preprocess import Prepared
from isologit.job.proof import config_hash, load_reference, make_certificate, plan_capture
from isologit.llm import open_model
from isologit.workload import BadRequest


@dataclass(frozen=True)
class _KeptRun:
    """What the folder says: the options that decide what is checked, requests and their outcome, hashes, the seed."""

    options: RunOptions
    prepared: Prepared
    finished: dict[str, FinishedRequest]
    hashes: Mapping[str, str]
    capture_seed: int
    inference_s: float


def recertify(
    folder: Path, *, model: str | None = None, seconds: float | None = None, observer: Observer | None = None
) -> Certificate:
    """Make the certificate of a finished run anew. Nothing is written.

    model: where the run's model is now, if not where it was. seconds: budget of re-scoring, as `certify_seconds`.
    Beyond what a run's own certificate checks, the requests and the weights must be those whose hashes `result.json`
    has. Raises OutputFolderError when the folder does not hold what is needed, ModelError or ConfigError for the model.
    """
    observer = observer or Silent()
    kept = _read(folder, model, seconds)
    rows = read_captures(folder / LOGITS / CAPTURES).by_request()
    checkpoint = open_model(kept.options.engine)
    config = checkpoint.config
    plan = plan_capture(kept.prepared.max_tokens, kept.options, kept.capture_seed, config.vocab_size)
    free = free_memory()
    how, _ = plan_certificate(
        config,
        [(len(r.prompt_token_ids), r.params.max_tokens) for r in kept.prepared.requests],
        FreeMemory(free.nbytes + resident_bytes(), free.limited_by),
        captured_rows=len(rows),
    )
    observer.stage("hashing the weights")
    hashes = {
        "weights": checkpoint.sha256(),
        "prompts": kept.prepared.sha256(),
        "config": config_hash(config),
        "code": kept.hashes["code"],
    }
    observer.stage("checking against the reference")
    found = make_certificate(
        kept.prepared,
        kept.finished,
        rows,
        plan,
        config.eos_token_ids,
        load_reference(checkpoint, how),
        observer,
        options=kept.options,
        seed=kept.capture_seed,
        run_s=kept.inference_s,
        found_hashes=hashes,
    )
    others = [
        Reason(f"other_{name}", f"the {name} are not those of the run: their hash differs from the one in {RESULT}")
        for name in ("weights", "prompts", "config")
        if hashes[name] != kept.hashes[name]
    ]
    return replace(found, reasons=(*others, *found.reasons))


def _read(folder: Path, model: str | None, seconds: float | None) -> _KeptRun:
    if not (folder / RESULT).is_file():
        raise OutputFolderError(f"{folder}: holds no finished run; name the output folder of one")
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        seed = int(json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))["capture"]["seed"])
        lines = [json.loads(line) for line in (folder / OUTPUTS).read_text(encoding="utf-8").split("\n") if line]
        given = result["options"]
        if given["save_logits"] != "captured":
            raise OutputFolderError(
                f"{folder}: keeps no captured logits (it ran with --save-logits {given['save_logits']}); run it again "
                "with --save-logits captured"
            )
        options = RunOptions(
            engine=_engine_options(given, model),
            replay=None if given["replay"] is None else Path(given["replay"]),
            ignore_eos=given["ignore_eos"],
            capture_rows=given["capture_rows"],
            certify_seconds=seconds,
        )
        prepared = _prepared(lines, options)
        finished = {line["id"]: _finished(line) for line in lines if line["segment"] is not None}
        return _KeptRun(options, prepared, finished, result["hashes"], seed, result["totals"]["inference_s"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputFolderError(
            f"{folder}: its files are damaged or of another version ({type(error).__name__}: {error}); run it again"
        ) from error


def _engine_options(given: Mapping[str, Any], model: str | None) -> EngineOptions:
    """The options that name the model."""
    config = given["model_config"]
    return EngineOptions(
        model=model or given["model"],
        model_config=None if config is None else Path(config),
        load_format=given["load_format"],
        qkv_layout=given["qkv_layout"],
        seed=given["seed"],
    )


def _prepared(lines: list[dict[str, Any]], options: RunOptions) -> Prepared:
    """The requests as they were issued, in their order."""
    requests: list[GenerationRequest] = []
    order: list[str | BadRequest] = []
    for line in lines:
        if line["segment"] is None:
            order.append(BadRequest(line["id"], "", line["error"], line["prompt"]))
            continue
        params = SamplingParams(max_tokens=line["max_tokens"], ignore_eos=options.ignore_eos)
        replayed = line["token_ids"] if options.mode == "replay" else None
        requests.append(GenerationRequest(line["id"], line["prompt_token_ids"], params, line["prompt"], replayed))
        order.append(line["id"])
    if not requests:
        raise ConfigError("none of the run's requests could run, so there is nothing to check")
    return Prepared(requests, order)


def _finished(line: dict[str, Any]) -> FinishedRequest:
    names = ("prompt", "text", "prompt_token_ids", "token_ids", "finish_reason", "stop_reason", "error", "metrics")
    fields = {name: line[name] for name in names}
    return FinishedRequest(request_id=line["id"], segment=line["segment"], rows={}, **fields)
