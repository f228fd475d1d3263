"""An entry in one file: LLaMA in numpy behind OpenAI's completions, with the judge's commitments in every message.

It shows how little an entry needs. One request is computed at a time; a request waits for its turn at every token.
"""

import argparse
import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import sentencepiece
from safetensors.numpy import load_file

FINGERPRINT = 16


class Llama:
    """The model's arithmetic in float32; `step` is one token of one sequence."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {
            name: tensor.astype(np.float32) for name, tensor in load_file(folder / "model.safetensors").items()
        }
        self.hidden = self.config["hidden_size"]
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.head_dim = self.config.get("head_dim") or self.hidden // self.heads
        self.layers, self.eps = self.config["num_hidden_layers"], self.config["rms_norm_eps"]
        theta = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]
        self.inverse = 1.0 / theta ** (np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim)
        self.prepare()

    def prepare(self):
        """Called once when the weights are there."""

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean() + self.eps) * self.weights[name]

    def rotate(self, x, position):
        """x [heads, head_dim] at one position."""
        angle = position * self.inverse
        cos, sin = np.cos(angle), np.sin(angle)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(np.float32)

    def linear(self, x, name):
        return self.weights[name] @ x

    def block(self, layer, x, cache, position):
        """One layer; cache: list of (keys, values) by layer, each [positions, kv_heads, head_dim]."""
        at = f"model.layers.{layer}."
        h = self.norm(x, at + "input_layernorm.weight")
        q = self.rotate(self.linear(h, at + "self_attn.q_proj.weight").reshape(self.heads, -1), position)
        k = self.rotate(self.linear(h, at + "self_attn.k_proj.weight").reshape(self.kv_heads, -1), position)
        v = self.linear(h, at + "self_attn.v_proj.weight").reshape(self.kv_heads, -1)
        keys, values = self.remember(cache, layer, k, v)
        group = self.heads // self.kv_heads
        scores = np.einsum("khd,hgd->hgk", keys, q.reshape(self.kv_heads, group, -1)) / np.sqrt(self.head_dim)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hgk,khd->hgd", scores, values).reshape(-1).astype(np.float32)
        x = x + self.linear(mixed, at + "self_attn.o_proj.weight")
        h = self.norm(x, at + "post_attention_layernorm.weight")
        gate, up = self.linear(h, at + "mlp.gate_proj.weight"), self.linear(h, at + "mlp.up_proj.weight")
        return x + self.linear(gate / (1 + np.exp(-gate)) * up, at + "mlp.down_proj.weight")

    def remember(self, cache, layer, k, v):
        """Add one position; returns keys and values of all positions so far."""
        keys, values = cache[layer]
        cache[layer] = np.concatenate([keys, k[None]]), np.concatenate([values, v[None]])
        return cache[layer]

    def empty_cache(self):
        nothing = np.zeros((0, self.kv_heads, self.head_dim), np.float32)
        return [(nothing, nothing) for _ in range(self.layers)]

    def step(self, token, position, cache):
        """What the LM head reads after one token, float32 [hidden]."""
        x = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.layers):
            x = self.block(layer, x, cache, position)
        return self.norm(x, "model.norm.weight").astype(np.float32)

    def logits(self, h):
        head = "lm_head.weight" if "lm_head.weight" in self.weights else "model.embed_tokens.weight"
        return self.linear(h, head)


class Entry:
    """Requests, the round's nonce, and what was committed to."""

    model_class = Llama

    def __init__(self, folder: Path):
        self.model = self.model_class(folder)
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.lock = threading.Lock()
        self.nonce, self.matrix = b"", None
        self.rows = {}

    def begin_round(self, nonce: bytes):
        """A new nonce: another matrix, and nothing remembered of the round before."""
        size = self.model.hidden
        stream = hashlib.shake_256(b"isologit/fingerprint/1" + nonce).digest(-(-FINGERPRINT * size // 8))
        bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=FINGERPRINT * size).reshape(FINGERPRINT, size)
        self.nonce, self.matrix, self.rows = nonce, ((1 - 2.0 * bits) / np.sqrt(size)).astype(np.float32), {}

    def commit(self, request_id: str, index: int, row: np.ndarray):
        """Fingerprint and commitment of one token, and the row kept for the reveal."""
        self.rows[request_id, index] = row
        name = request_id.encode()
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.nonce + len(name).to_bytes(4, "little") + name + index.to_bytes(8, "little") + row.tobytes())
        return {
            "fingerprint": base64.b64encode((self.matrix @ row).astype("<f4").tobytes()).decode(),
            "commitment": base64.b64encode(digest.digest()).decode(),
        }

    def reveal(self, request_id: str, index: int) -> np.ndarray:
        return self.rows[request_id, index]

    def choose(self, logits: np.ndarray) -> int:
        return int(logits.argmax())

    def generate(self, request_id, prompt, max_tokens, asked):
        """Yields (token id, text so far, row); asked: the request's body."""
        ids = [1, *self.tokenizer.encode(prompt)]
        cache, row, out = self.model.empty_cache(), None, []
        with self.lock:
            for position, token in enumerate(ids):
                row = self.model.step(token, position, cache)
        while True:
            with self.lock:
                token = self.choose(self.model.logits(row))
            out.append(token)
            yield token, self.tokenizer.decode([t for t in out if t > 2]), row
            if token == 2 or len(out) == max_tokens:
                return
            with self.lock:
                row = self.model.step(token, len(ids) + len(out) - 1, cache)

    def messages(self, request_id, prompt, max_tokens, asked):
        """The stream's JSON values."""
        given, count, reason = "", 0, "length"
        for token, text, row in self.generate(request_id, prompt, max_tokens, asked):
            piece, given, reason = text[len(given) :], text, "stop" if token == 2 else "length"
            message = {"choices": [{"index": 0, "text": piece, "token_ids": [token], "finish_reason": None}]}
            if self.matrix is not None:
                message["commit"] = [self.commit(request_id, count, row)]
            count += 1
            yield message
        yield {"choices": [{"index": 0, "text": "", "token_ids": [], "finish_reason": reason}]}
        yield {"choices": [], "usage": {"completion_tokens": count}}


def handler(entry: Entry):
    """The HTTP side."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, body, status=200):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.answer({}, 200 if self.path == "/health" else 404)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/judge/round":
                entry.begin_round(bytes.fromhex(body["nonce"]))
                return self.answer({"hidden_size": entry.model.hidden})
            if self.path == "/judge/reveal":
                rows = []
                for asked in body["positions"]:
                    row = np.ascontiguousarray(entry.reveal(asked["request_id"], asked["index"]), "<f4")
                    rows.append({**asked, "hidden": base64.b64encode(row.tobytes()).decode()})
                return self.answer({"rows": rows})
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            request_id = self.headers.get("X-Request-Id", "")
            for message in entry.messages(request_id, body["prompt"], body["max_tokens"], body):
                self.write(json.dumps(message))
            self.write("[DONE]")
            return None

        def write(self, text):
            self.wfile.write(f"data: {text}\n\n".encode())

    return Handler


def main(entry_class=Entry):
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    args, _ = parser.parse_known_args()
    entry = entry_class(args.model)
    ThreadingHTTPServer.request_queue_size = 256
    ThreadingHTTPServer(("127.0.0.1", args.port), handler(entry)).serve_forever()


if __name__ == "__main__":
    main()
