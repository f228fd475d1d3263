"""This engine."""

from __future__ import annotations

from collections.abc import Sequence

from contract import Generate, Job, Request, adapt

from isologit import LLM, GenerationRequest, SamplingParams


def load(job: Job) -> Generate:
    """Settings: `max_num_seqs` and `max_num_batched_tokens`; null lets the planner choose."""
    llm = LLM(job.model_dir, enable_prefix_caching=False, num_threads=job.threads, **job.settings)
    llm.warm_up()

    def generate(requests: Sequence[Request]) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in requests]
        batch = [
            GenerationRequest(str(i), r.prompt_token_ids, SamplingParams(max_tokens=r.max_tokens, ignore_eos=True))
            for i, r in enumerate(requests)
        ]
        for output in llm.run(batch):
            outputs[int(output.request_id)] = output.token_ids
        return outputs

    return generate


if __name__ == "__main__":
    adapt(load, ["isologit", "torch", "numba"])
