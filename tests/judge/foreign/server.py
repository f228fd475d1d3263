"""A server that knows nothing of this judge: transformers behind FastAPI, OpenAI's completions with log-probabilities.

`server.py PORT MODEL exact|int8`; int8: weights are rounded to eight bits.
"""

import json
import sys
import threading
from collections.abc import Iterator

import sentencepiece
import torch
import transformers
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

PORT, MODEL, ARITHMETIC = int(sys.argv[1]), sys.argv[2], sys.argv[3]
BOS, EOS = 1, 2
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
tokenizer = sentencepiece.SentencePieceProcessor(model_file=f"{MODEL}/tokenizer.model")
app, lock = FastAPI(), threading.Lock()

if ARITHMETIC == "int8":
    for weight in model.parameters():
        if weight.ndim == 2:
            scale = weight.data.abs().amax(dim=1, keepdim=True) / 127
            weight.data = (weight.data / scale).round() * scale


class Completion(BaseModel):
    """The fields of OpenAI's request that are used here; others are left alone."""

    model: str
    prompt: str
    max_tokens: int = 16
    temperature: float = 1.0
    logprobs: int | None = None
    stream: bool = False
    return_token_ids: bool = False


@app.get("/health")
def health() -> dict:
    return {}


@app.post("/v1/completions")
def completions(asked: Completion) -> StreamingResponse:
    return StreamingResponse(stream(asked), media_type="text/event-stream")


def stream(asked: Completion) -> Iterator[str]:
    given, out, reason = "", [], "length"
    for token, row in generate([BOS, *tokenizer.encode(asked.prompt)], asked.max_tokens):
        out.append(token)
        text = tokenizer.decode([t for t in out if t > EOS])
        piece, given = text[len(given) :], text
        choice = {"index": 0, "text": piece, "finish_reason": None}
        if asked.return_token_ids:
            choice["token_ids"] = [token]
        if asked.logprobs:
            best = torch.log_softmax(row.double(), dim=-1).topk(asked.logprobs)
            named = {
                tokenizer.id_to_piece(i): p for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            }
            choice["logprobs"] = {"tokens": [tokenizer.id_to_piece(token)], "top_logprobs": [named]}
        yield message({"choices": [choice]})
        reason = "stop" if token == EOS else "length"
    yield message({"choices": [{"index": 0, "text": "", "token_ids": [], "finish_reason": reason}]})
    yield message({"choices": [], "usage": {"completion_tokens": len(out)}})
    yield "data: [DONE]\n\n"


def generate(ids: list[int], max_tokens: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Greedy tokens, each with the logits that chose it."""
    cache, new = None, ids
    for _ in range(max_tokens):
        with lock, torch.inference_mode():
            result = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache, row = result.past_key_values, result.logits[0, -1]
        token = int(row.argmax())
        yield token, row
        if token == EOS:
            return
        new = [token]


def message(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning")
