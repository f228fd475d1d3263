"""llama.cpp through llama-cpp-python's bindings, with continuous batching driven from here."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from contract import Generate, Job, Request, adapt, converted, order_of
from safetensors import safe_open

_F32 = 0  # GGML_TYPE_F32
_FILE = "model.gguf"
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(job: Job) -> None:
    """Write a float32 GGUF file without a vocabulary."""
    converted(job, "gguf", lambda folder: _write_gguf(job, folder / _FILE))


def _write_gguf(job: Job, file: Path) -> None:
    config = job.model_config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    for shard in sorted(job.model_dir.glob("*.safetensors")):
        with safe_open(shard, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                values = tensors.get_tensor(name).astype(np.float32)
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    values = _interleaved(values, heads if "q_proj" in name else kv_heads)
                writer.add_tensor(_gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.weight"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head reordered from halves to pairs, as llama.cpp rotates them. [out, in] to [out, in]."""
    return np.ascontiguousarray(weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))


@dataclass
class _Sequence:
    index: int
    max_tokens: int
    pending: list[int]  # tokens not yet fed: the rest of the prompt, or the last output token
    fed: int = 0
    output: list[int] = field(default_factory=list)


def load(job: Job) -> Generate:
    """Settings: `slots`, `batch_tokens`, `flash_attention`, `order`."""
    llama_cpp.llama_backend_init()
    _keep = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(_keep, None)
    slots, batch_tokens = min(job.settings["slots"], len(job.requests)), job.settings["batch_tokens"]
    file = job.model_dir.with_name(f"{job.model_dir.name}-gguf") / _FILE
    model_options = llama_cpp.llama_model_default_params()
    model_options.use_mmap = False  # read while loading, not while the clock runs
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_options)
    options = llama_cpp.llama_context_default_params()
    options.n_seq_max = slots
    options.n_ctx = slots * (-(-job.max_length // 256) * 256)
    options.n_batch = options.n_ubatch = batch_tokens
    options.n_threads = options.n_threads_batch = job.threads
    options.type_k = options.type_v = _F32
    options.flash_attn_type = int(job.settings["flash_attention"])
    options.kv_unified = False
    context = llama_cpp.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError("llama.cpp could not make a context with these settings")
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(batch_tokens, 0, 1)
    vocab_size = job.model_config["vocab_size"]

    def next_token(row: int) -> int:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), shape=(vocab_size,))
        return int(logits.argmax())

    def generate(requests: Sequence[Request]) -> list[list[int]]:
        queue = deque(
            _Sequence(i, requests[i].max_tokens, list(requests[i].prompt_token_ids))
            for i in order_of(requests, job.settings["order"])
        )
        outputs: list[list[int]] = [[] for _ in requests]
        running: dict[int, _Sequence] = {}
        free = list(range(slots))
        while queue or running:
            while queue and free:
                running[free.pop()] = queue.popleft()
            rows = _fill(batch, running, batch_tokens)
            if llama_cpp.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            for slot, row in rows.items():
                sequence = running[slot]
                sequence.output.append(next_token(row))
                sequence.pending = sequence.output[-1:]
                if len(sequence.output) == sequence.max_tokens:
                    outputs[sequence.index] = sequence.output
                    llama_cpp.llama_memory_seq_rm(memory, slot, -1, -1)
                    del running[slot]
                    free.append(slot)
        return outputs

    return generate


def _fill(batch: llama_cpp.llama_batch, running: dict[int, _Sequence], batch_tokens: int) -> dict[int, int]:
    """Put each sequence's next tokens into the batch; returns {slot: row} of the rows whose logits are wanted."""
    batch.n_tokens = 0
    rows = {}
    for slot, sequence in sorted(running.items(), key=lambda item: len(item[1].pending)):
        taken = sequence.pending[: batch_tokens - batch.n_tokens]
        for offset, token in enumerate(taken):
            row = batch.n_tokens
            batch.token[row] = token
            batch.pos[row] = sequence.fed + offset
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = slot
            batch.logits[row] = False
            batch.n_tokens += 1
        sequence.fed += len(taken)
        sequence.pending = sequence.pending[len(taken) :]
        if taken and not sequence.pending:
            batch.logits[batch.n_tokens - 1] = True
            rows[slot] = batch.n_tokens - 1
    return rows


if __name__ == "__main__":
    adapt(load, ["llama-cpp-python", "gguf"], convert)
