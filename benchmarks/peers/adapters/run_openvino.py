"""OpenVINO GenAI's continuous batching pipeline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from contract import Generate, Job, Request, adapt, converted, in_given_order, order_of


def convert(job: Job) -> None:
    """Export the model with float32 weights."""

    def write(folder: Path) -> None:
        task = ["--task", "text-generation-with-past", "--weight-format", "fp32", "--disable-convert-tokenizer"]
        command = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "--model", job.model_dir]
        subprocess.run([*command, *task, folder], check=True)

    converted(job, "openvino", write)


def load(job: Job) -> Generate:
    """Settings: `max_num_seqs`, `max_num_batched_tokens`, `order`."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = job.settings["max_num_seqs"]
    scheduler.max_num_batched_tokens = job.settings["max_num_batched_tokens"]
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    scheduler.cache_size = 4  # GiB
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        job.model_dir.with_name(f"{job.model_dir.name}-openvino"),
        scheduler_config=scheduler,
        device="CPU",
        properties={
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "INFERENCE_NUM_THREADS": job.threads,
        },
    )

    def generate(requests: Sequence[Request]) -> list[list[int]]:
        order = list(order_of(requests, job.settings["order"]))
        outputs = pipeline.generate(
            [openvino.Tensor(np.array([requests[i].prompt_token_ids], dtype=np.int64)) for i in order],
            [
                openvino_genai.GenerationConfig(max_new_tokens=requests[i].max_tokens, ignore_eos=True, do_sample=False)
                for i in order
            ],
        )
        return in_given_order(order, [output.m_generation_ids[0] for output in outputs])

    return generate


if __name__ == "__main__":
    adapt(load, ["openvino", "openvino-genai", "optimum-intel"], convert)
