"""CTranslate2. It has no continuous batching: sorted batches run to their longest member, the surplus is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ctranslate2
from contract import Generate, Job, Request, adapt, converted, in_given_order, order_of


def convert(job: Job) -> None:
    """Convert the Hugging Face folder with float32 weights."""

    def write(folder: Path) -> None:
        converter = ctranslate2.converters.TransformersConverter(str(job.model_dir))
        converter.convert(str(folder), quantization="float32", force=True)

    converted(job, "ctranslate2", write)


def load(job: Job) -> Generate:
    """Settings: `batch_size`, `order`."""
    generator = ctranslate2.Generator(
        str(job.model_dir.with_name(f"{job.model_dir.name}-ctranslate2")),
        device="cpu",
        compute_type="float32",
        inter_threads=1,
        intra_threads=job.threads,
    )
    words = [f"<{i}>" for i in range(job.model_config["vocab_size"])]  # the names `models.py` gives the tokens

    def generate(requests: Sequence[Request]) -> list[list[int]]:
        order = list(order_of(requests, job.settings["order"]))
        outputs = []
        for start in range(0, len(order), job.settings["batch_size"]):
            batch = [requests[i] for i in order[start : start + job.settings["batch_size"]]]
            longest = max(request.max_tokens for request in batch)
            results = generator.generate_batch(
                [[words[token] for token in request.prompt_token_ids] for request in batch],
                max_length=longest,
                min_length=longest,
                end_token=[],
                sampling_topk=1,
                include_prompt_in_result=False,
            )
            outputs += [r.sequences_ids[0][: b.max_tokens] for r, b in zip(results, batch, strict=True)]
        return in_given_order(order, outputs)

    return generate


if __name__ == "__main__":
    adapt(load, ["ctranslate2"], convert)
