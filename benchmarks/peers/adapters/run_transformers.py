"""Hugging Face transformers, `model.generate` one request at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from contract import Generate, Job, Request, adapt
from transformers import AutoModelForCausalLM


def load(job: Job) -> Generate:
    """Settings: `attn_implementation`."""
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=torch.float32, **job.settings).eval()
    model.generation_config.eos_token_id = None

    def generate(requests: Sequence[Request]) -> list[list[int]]:
        outputs = []
        for request in requests:
            ids = torch.tensor([request.prompt_token_ids])
            with torch.inference_mode():
                row = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_tokens, do_sample=False
                )[0]
            outputs.append(row[ids.shape[1] :].tolist())
        return outputs

    return generate


if __name__ == "__main__":
    adapt(load, ["transformers", "torch"])
