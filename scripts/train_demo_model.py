"""Train the built-in demo model from a seed: `python scripts/train_demo_model.py --seed 0 --output DIR`.

Writes a SentencePiece tokenizer and a small grouped-query LLaMA, both learnt from `isologit.workload.textgen`. The
weights are rounded to float16, as the checkpoints of the contest's model are. The same seed gives the same files on
the same kind of machine and library versions.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from isologit.workload.textgen import pairs

VOCAB_SIZE = 1024
BATCH, LENGTH = 8, 256
CORPUS_PAIRS = 60_000
PEAK_RATE = 4e-3


def train_tokenizer(texts: list[str], file: Path) -> sentencepiece.SentencePieceProcessor:
    """A byte-fallback BPE tokenizer with LLaMA's special ids (unk 0, bos 1, eos 2)."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
        num_threads=1,
    )
    file.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def build_model(seed: int) -> LlamaForCausalLM:
    """The demo shape, randomly initialised."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # one order of sums: the files do not depend on the number of cores
    start = time.perf_counter()
    corpus = list(islice(pairs(args.seed), CORPUS_PAIRS))
    texts = [f"{pair.instruction}\n{pair.answer}" for pair in corpus]
    tokenizer = train_tokenizer(texts[:8000], args.output / "tokenizer.model")
    stream = np.fromiter((t for ids in tokenizer.encode(texts) for t in (1, *ids, 2)), np.int64)
    print(f"{len(texts)} pairs, {len(stream)} tokens, {time.perf_counter() - start:.0f} s")
    model = build_model(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    rng = np.random.default_rng(args.seed)
    losses: list[float] = []
    for step in range(args.steps):
        rate = PEAK_RATE * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = rng.integers(0, len(stream) - LENGTH - 1, BATCH)
        tokens = torch.from_numpy(np.stack([stream[s : s + LENGTH + 1] for s in starts]))
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(
                f"step {step + 1}: loss {np.mean(losses[-100:]):.4f}, {time.perf_counter() - start:.0f} s", flush=True
            )
    model.to(torch.float16).save_pretrained(args.output)
    (args.output / "training.json").write_text(
        json.dumps({"seed": args.seed, "steps": args.steps, "loss": round(float(np.mean(losses[-100:])), 4)}) + "\n"
    )


if __name__ == "__main__":
    main()
