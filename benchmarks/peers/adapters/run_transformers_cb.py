"""Hugging Face transformers, its continuous batching."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from contract import Generate, Job, Request, adapt, order_of
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

_NO_END = -1


def load(job: Job) -> Generate:
    """Settings: `slots`, `max_batch_tokens`, `attn_implementation`, `order`."""
    torch.set_num_threads(job.threads)
    settings = job.settings
    model = AutoModelForCausalLM.from_pretrained(
        job.model_dir, dtype=torch.float32, attn_implementation=settings["attn_implementation"]
    ).eval()
    page = 32
    pages = -(-job.max_length // page)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=_NO_END),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page,
            num_blocks=(pages + 1) * min(settings["slots"], len(job.requests)),
            max_batch_tokens=settings["max_batch_tokens"],
            max_requests_per_batch=settings["slots"],
            allow_block_sharing=False,
        ),
    )
    manager.start()

    def generate(requests: Sequence[Request]) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in requests]
        waiting = {}
        for i in order_of(requests, settings["order"]):
            request = requests[i]
            name = manager.add_request(
                request.prompt_token_ids, max_new_tokens=request.max_tokens, eos_token_id=_NO_END
            )
            waiting[name] = i
        while waiting:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the generation thread ended before all requests were done")
            elif result.error is not None:
                raise RuntimeError(result.error)
            elif result.is_finished():
                outputs[waiting.pop(result.request_id)] = result.generated_tokens
        return outputs

    return generate


if __name__ == "__main__":
    adapt(load, ["transformers", "torch"])
