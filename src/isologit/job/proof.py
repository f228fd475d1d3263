"""The run's proof: which rows are kept in secret, what is saved of them, and the certificate."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from isologit.checkpoints.checkpoint import Checkpoint
from isologit.common.progress import Observer, Progress
from isologit.config import ModelConfig
from isologit.fidelity import (
    CAPTURES,
    CapturedRow,
    Certificate,
    Reference,
    ScoredRequest,
    StreamedReference,
    certify,
    code_hash,
    contest_positions,
    draw_capture_plan,
    write_captures,
    write_contest_logits,
)
from isologit.fidelity.certifier import ScoringReference
from isologit.job.engine import Engine
from isologit.job.journal import FinishedRequest
from isologit.job.options import RunOptions
from isologit.job.preprocess import Prepared

Rows = Mapping[tuple[str, int], np.ndarray]
CapturePlan = dict[str, frozenset[int]]

_MOST_ROWS = 2000
_LEAST_ROWS = 16
_SHARE_OF_TOKENS = 0.02
_MOST_BYTES = 512 << 20
_LEAST_SECONDS = 60.0


def fresh_capture_seed(options: RunOptions) -> int:
    """The seed asked for, or a secret one that nobody can know before the run is over."""
    return secrets.randbits(63) if options.capture_seed is None else options.capture_seed


def num_captured_rows(lengths: Mapping[str, int], options: RunOptions, vocab_size: int) -> int:
    """How many rows are kept of requests of so many output tokens at most: those asked for, or a share of all."""
    if options.capture_rows is not None:
        return options.capture_rows
    rows = min(_MOST_ROWS, max(_LEAST_ROWS, int(_SHARE_OF_TOKENS * sum(lengths.values()))))
    return max(1, min(rows, _MOST_BYTES // (4 * vocab_size)))


def plan_capture(lengths: Mapping[str, int], options: RunOptions, seed: int, vocab_size: int) -> CapturePlan:
    """The rows the certificate will ask for."""
    return draw_capture_plan(lengths, seed=seed, rows=num_captured_rows(lengths, options, vocab_size))


def add_contest_rows(plan: CapturePlan, prepared: Prepared) -> CapturePlan:
    """The plan and every row the contest saves."""
    return {
        request.request_id: plan.get(request.request_id, frozenset())
        | frozenset(contest_positions(len(request.prompt_token_ids), request.params.max_tokens))
        for request in prepared.requests
    }


def save_rows(folder: Path, rows: Rows, finished: Mapping[str, FinishedRequest], options: RunOptions) -> None:
    """Write `logits/`: our captures file, or the contest's files."""
    kept = [_captured_row(finished[request_id], index, row) for (request_id, index), row in rows.items()]
    if options.save_logits == "captured":
        write_captures(folder / CAPTURES, kept)
    else:
        saved = {(r.request_id, i) for r in finished.values() for i in _contest_indices(r)}
        write_contest_logits(folder, (row for row in kept if (row.request_id, row.index) in saved))


def _contest_indices(request: FinishedRequest) -> list[int]:
    return contest_positions(len(request.prompt_token_ids), len(request.token_ids))


def _captured_row(request: FinishedRequest, index: int, row: np.ndarray) -> CapturedRow:
    return CapturedRow(request.request_id, request.prompt_token_ids, request.token_ids, index, row)


def hashes(engine: Engine, prepared: Prepared) -> dict[str, str]:
    """What ties a certificate to what was run."""
    return {
        "weights": engine.checkpoint.sha256(),
        "prompts": prepared.sha256(),
        "config": config_hash(engine.config),
        "code": code_hash(),
    }


def config_hash(config: ModelConfig) -> str:
    """Hash of the model's configuration."""
    return hashlib.sha256(json.dumps(config.to_hf_dict(), sort_keys=True).encode()).hexdigest()


def load_reference(checkpoint: Checkpoint, how: Literal["whole", "streamed"], device: str = "cpu") -> ScoringReference:
    """Hugging Face's model of the checkpoint; torch's threads are the caller's. Raises ModelError."""
    if how == "whole":
        return Reference(checkpoint, device=device)
    return StreamedReference(checkpoint, device=device)


def make_certificate(
    prepared: Prepared,
    finished: Mapping[str, FinishedRequest],
    rows: Rows,
    plan: CapturePlan,
    eos_token_ids: Sequence[int],
    reference: ScoringReference,
    observer: Observer,
    *,
    options: RunOptions,
    seed: int,
    run_s: float,
    found_hashes: Mapping[str, str],
) -> Certificate:
    """Judge the run. The budget of re-scoring is `certify_seconds`, or the run's own time and at least a minute."""
    limits = prepared.max_tokens
    records = [
        ScoredRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=request.token_ids,
            finish_reason=request.finish_reason,
            max_tokens=limits[request.request_id],
            ignore_eos=options.ignore_eos,
        )
        for request in finished.values()
    ]
    replayed = {r.request_id: r.replay_token_ids for r in prepared.requests if r.replay_token_ids is not None}
    return certify(
        records,
        rows,
        reference,
        expected_ids=[request.request_id for request in prepared.requests],
        eos_token_ids=eos_token_ids,
        capture_plan=plan,
        mode=options.mode,
        replayed=replayed,
        num_refused=len(prepared.refused),
        time_budget_s=options.certify_seconds or max(_LEAST_SECONDS, run_s),
        seed=seed,
        hashes=found_hashes,
        on_progress=lambda done, of: observer.progress(Progress(int(done), of, done / of)),
    )
