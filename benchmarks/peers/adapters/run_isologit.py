"""This engine, and the certificate of its timed run."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from contract import Generate, Job, Request, adapt

from isologit import LLM, GenerationRequest, RequestOutput, SamplingParams
from isologit.fidelity import Reference, ScoredRequest, certify, draw_capture_plan

_CACHE_BYTES = 4 << 30  # keys and values, as the others have
_CAPTURED_ROWS = 200
_CERTIFY_SECONDS = 30.0


class _Engine:
    """Runs requests and keeps what the certificate of the last run needs."""

    def __init__(self) -> None:
        self._outputs: list[RequestOutput] = []
        self._plan: dict[str, frozenset[int]] = {}

    def load(self, job: Job) -> Generate:
        """Settings: `max_num_seqs` and `max_num_batched_tokens`; null lets the planner choose."""
        self._llm = LLM(
            job.model_dir,
            enable_prefix_caching=False,
            speculative_config=None,
            kv_cache_memory_bytes=_CACHE_BYTES,
            num_threads=job.threads,
            **job.settings,
        )
        self._llm.warm_up()
        return self._generate

    def _generate(self, requests: Sequence[Request]) -> list[list[int]]:
        limits = {str(i): request.max_tokens for i, request in enumerate(requests)}
        self._plan = draw_capture_plan(limits, seed=secrets.randbits(63), rows=_CAPTURED_ROWS)
        batch = [
            GenerationRequest(
                str(i),
                request.prompt_token_ids,
                SamplingParams(max_tokens=request.max_tokens, ignore_eos=True),
                capture=self._plan.get(str(i), frozenset()),
            )
            for i, request in enumerate(requests)
        ]
        self._outputs = sorted(self._llm.run(batch), key=lambda output: int(output.request_id))
        return [output.token_ids for output in self._outputs]

    def last_run(self) -> dict[str, Any]:
        """What the planner chose and predicted for the last run, its steps, and one thread's waiting for others."""
        plan = self._llm.last_plan
        assert plan is not None
        return {
            "max_num_seqs": plan.max_num_seqs,
            "max_num_batched_tokens": plan.max_num_batched_tokens,
            "predicted_s": plan.predicted_seconds,
            "predicted_steps": plan.predicted_steps,
            "steps": len(self._llm.step_records),
            "waiting_s": self._llm.phase_seconds().get("wait", 0.0),
        }

    def certificate(self) -> dict[str, Any]:
        """Hugging Face transformers re-scores outputs for half a minute and compares the rows kept during the run."""
        rows: dict[tuple[str, int], np.ndarray] = {}
        records = []
        for output in self._outputs:
            rows |= {(output.request_id, index): row for index, row in output.captured.items()}
            records.append(
                ScoredRequest(
                    request_id=output.request_id,
                    prompt_token_ids=output.prompt_token_ids,
                    token_ids=output.token_ids,
                    finish_reason=output.finish_reason,
                    max_tokens=len(output.token_ids),
                    ignore_eos=True,
                )
            )
        self._llm.close()
        found = certify(
            records,
            rows,
            Reference(self._llm.checkpoint),
            expected_ids=[output.request_id for output in self._outputs],
            eos_token_ids=self._llm.config.eos_token_ids,
            capture_plan=self._plan,
            time_budget_s=_CERTIFY_SECONDS,
        ).to_dict()
        return {
            "verdict": found["verdict"],
            "reasons": found["reasons"],
            "captured_rows": found["captured"]["rows"],
            "max_abs": found["captured"]["max_abs"],
            "requests_rescored": found["requests"]["rescored"],
            "tokens_rescored": found["greedy"]["tokens"],
            "tokens_agreed": found["greedy"]["agreed"],
            "ties": found["greedy"]["ties"],
        }


if __name__ == "__main__":
    engine = _Engine()
    adapt(engine.load, ["isologit", "torch", "numba"], describe=engine.last_run, certify=engine.certificate)
