"""The outside model: transformers' LLaMA of a checkpoint, and what it is. The reference's only source of arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from isologit.errors import ModelError

_CACHE_LINE = 64


class ConfigLike(Protocol):
    """What the reference needs of a model configuration."""

    def to_hf_dict(self) -> dict[str, Any]:
        """A `config.json` dictionary."""
        ...


class CheckpointLike(Protocol):
    """What the reference needs of a checkpoint."""

    @property
    def config(self) -> ConfigLike: ...
    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...
    @property
    def kind(self) -> str: ...
    @property
    def source(self) -> Path: ...


def is_folder(checkpoint: CheckpointLike) -> bool:
    """Whether transformers can read it by itself."""
    return checkpoint.kind == "huggingface" and (checkpoint.source / "config.json").is_file()


def load_llama(checkpoint: CheckpointLike, dtype: torch.dtype) -> tuple[Any, str]:
    """`LlamaForCausalLM` with eager attention and its weights in `dtype`, and how it was loaded. Raises ModelError."""
    with naming(checkpoint):
        if is_folder(checkpoint):
            model, how = _from_folder(checkpoint.source, dtype), "transformers from_pretrained"
        else:
            model, how = _from_tensors(checkpoint, dtype), "checkpoint tensors, strict load_state_dict"
    _align(model)
    return model, how


def llama_config(checkpoint: CheckpointLike) -> Any:
    """transformers' configuration, with eager attention."""
    from transformers import LlamaConfig

    if is_folder(checkpoint):
        return LlamaConfig.from_pretrained(checkpoint.source, attn_implementation="eager", local_files_only=True)
    return LlamaConfig.from_dict(checkpoint.config.to_hf_dict(), attn_implementation="eager")


@contextmanager
def naming(checkpoint: CheckpointLike) -> Iterator[None]:
    """Whatever goes wrong with the files becomes a ModelError that names the checkpoint."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{checkpoint.source}: the reference cannot load this model ({reason})") from error


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32: float32 products in float32 on every device."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def versions() -> dict[str, str]:
    """Of the libraries that compute."""
    import transformers

    return {"transformers": str(transformers.__version__), "torch": str(torch.__version__)}


def _align(model: Any) -> None:
    """Copy what lies in a mapped file as the file has it.

    NOTE: on a CPU the last bits of the library's products depend on where in a cache line its inputs begin.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _CACHE_LINE:
            parameter.data = parameter.data.clone()


class FolderTensors(Mapping[str, torch.Tensor]):
    """The weights of a Hugging Face folder as safetensors gives them, without our reader; none is held.

    NOTE: a file is opened for each weight and closed with it, so that pages read do not stay in this process's memory.
    """

    def __init__(self, source: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in _weight_files(source):
            with safe_open(file, framework="pt") as opened:
                self._files.update(dict.fromkeys(opened.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _weight_files(source: Path) -> list[Path]:
    """As `from_pretrained` finds them: one file, or those that the index names."""
    single, index = source / "model.safetensors", source / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    return [source / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _from_folder(source: Path, dtype: torch.dtype) -> Any:
    """The model of a Hugging Face folder, without our reader. Raises ModelError when a weight is missing."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = LlamaForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    wrong = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind])
    if wrong:
        raise ModelError(f"{source}: {wrong[0]} is missing or misshapen ({len(wrong)} such weights); repair the model")
    return model


def _from_tensors(checkpoint: CheckpointLike, dtype: torch.dtype) -> Any:
    """The model with the checkpoint's tensors in place of its parameters: nothing is initialised or copied twice."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = llama_config(checkpoint)
    state = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    # NOTE: rotary frequencies are not part of a checkpoint; those made on the meta device have no values.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model
