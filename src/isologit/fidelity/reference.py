"""The reference: Hugging Face `LlamaForCausalLM`, eager attention, float32, one request at a time.

Code from outside on purpose. It does not know how a run was made, nor what a verdict is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from isologit.errors import ModelError

_NOISE_STEPS = 16
_PAD = 0  # padded positions are masked, so any id of the vocabulary will do


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


@dataclass(frozen=True)
class NoiseFloor:
    """How far the reference is from itself when only shapes change: largest difference over `rows` pairs of rows."""

    max_abs: float
    rows: int
    batch_size: int


class Reference:
    """The model as a plain user of transformers runs it.

    checkpoint: a Hugging Face folder is read by transformers' own `from_pretrained`, so that not even our reader is
    shared; anything else (another kind, or a weights file without its folder) is built from the checkpoint's
    configuration and tensors, widened to float32; float32 tensors are used in place. num_threads: torch threads while a
    method runs; None leaves them as they are.

    Raises ModelError when the checkpoint does not fit `LlamaForCausalLM`.
    """

    def __init__(self, checkpoint: CheckpointLike, *, num_threads: int | None = None) -> None:
        self._num_threads = num_threads
        try:
            if checkpoint.kind == "huggingface" and (checkpoint.source / "config.json").is_file():
                self._model, self._loaded_by = _from_folder(checkpoint.source), "transformers from_pretrained"
            else:
                self._model, self._loaded_by = _from_tensors(checkpoint), "checkpoint tensors, strict load_state_dict"
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{checkpoint.source}: the reference cannot load this model ({reason})") from error
        self._model.eval()
        self.vocab_size = int(self._model.config.vocab_size)

    def identity(self) -> dict[str, str]:
        """What the reference is, with versions."""
        import transformers

        return {
            "class": type(self._model).__name__,
            "attention": str(self._model.config._attn_implementation),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "batch": "one request at a time",
            "loaded_by": self._loaded_by,
            "transformers": str(transformers.__version__),
            "torch": str(torch.__version__),
        }

    def score(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> np.ndarray:
        """float32 [n, vocab]: row i is the one that chooses output token i, given the output tokens before it.

        One forward pass over prompt and output (teacher forcing); only the n rows wanted go through the last product.
        Both lists must not be empty.
        """
        fed = torch.tensor([[*prompt_token_ids, *token_ids[:-1]]])  # [1, p + n - 1]
        with self._threads(), torch.inference_mode():
            logits = self._model(input_ids=fed, use_cache=False, logits_to_keep=len(token_ids)).logits
        return _rows(logits[0])

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        eos_token_ids: Collection[int] = (),
        *,
        ignore_eos: bool = False,
        forced: Sequence[int] | None = None,
    ) -> list[int]:
        """Greedy output tokens with transformers' own key-value cache; the last one is EOS if the model ended.

        This is the timed baseline. It is the loop of `model.generate(do_sample=False)` without its bookkeeping: the
        prompt once, then one token a step, and only the last position through the last product. Both gave the same
        tokens and the same speed within 4 % (4.3 to 4.9 ms a token on two cores, 3.3 million parameters).

        forced: output tokens to feed instead of the argmax (replay); the computation is the same, EOS does not end it,
        and `max_tokens` is not used.
        """
        num_steps = max_tokens if forced is None else len(forced)
        stop = frozenset() if ignore_eos or forced is not None else frozenset(eos_token_ids)
        cache, fed = self._empty_cache(), prompt_token_ids
        chosen: list[int] = []
        with self._threads(), torch.inference_mode():
            for step in range(num_steps):
                token = int(self._step(fed, cache).argmax())
                chosen.append(token if forced is None else forced[step])
                if token in stop:
                    break
                fed = chosen[-1:]
        return chosen

    def noise_floor(self, samples: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int = 4) -> NoiseFloor:
        """Compare the reference with itself: `score` against other shapes of the same computation.

        samples: (prompt, output tokens) pairs, at least one. They are run together in a right-padded, masked batch
        (repeated when there are fewer than `batch_size`), and the first few tokens of the first one by one.
        """
        chosen = list(islice(cycle(samples), batch_size))
        lengths = [len(prompt) + len(tokens) - 1 for prompt, tokens in chosen]
        fed = torch.full((batch_size, max(lengths) + 1), _PAD)  # one column of padding at least
        mask = torch.zeros_like(fed)
        for i, (prompt, tokens) in enumerate(chosen):
            fed[i, : lengths[i]] = torch.tensor([*prompt, *tokens[:-1]])
            mask[i, : lengths[i]] = 1
        first = min(len(prompt) for prompt, _ in chosen) - 1
        with self._threads(), torch.inference_mode():
            keep = fed.shape[1] - first
            together = self._model(input_ids=fed, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        worst, rows = 0.0, 0
        for i, (prompt, tokens) in enumerate(chosen[: len(samples)]):
            alone, start = self.score(prompt, tokens), len(prompt) - 1 - first
            others = [_rows(together[i, start : start + len(tokens)])]
            if i == 0:
                others.append(self._one_by_one(prompt, tokens[:_NOISE_STEPS]))
            for other in others:
                worst, rows = max(worst, float(np.abs(other - alone[: len(other)]).max())), rows + len(other)
        return NoiseFloor(worst, rows, batch_size)

    def _one_by_one(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> np.ndarray:
        """The rows of `score`, one decode step each."""
        cache, fed = self._empty_cache(), prompt_token_ids
        found = []
        with self._threads(), torch.inference_mode():
            for token in token_ids:
                found.append(_rows(self._step(fed, cache)))
                fed = [token]
        return np.stack(found)

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _step(self, fed: Sequence[int], cache: Any) -> torch.Tensor:
        """float32 [vocab]: the row after the last of the tokens fed."""
        ids = torch.tensor([list(fed)])  # [1, p], later [1, 1]
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        row: torch.Tensor = logits[0, -1]
        return row

    @contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        if self._num_threads is None or self._num_threads == before:
            yield
            return
        torch.set_num_threads(self._num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _rows(logits: torch.Tensor) -> np.ndarray:
    rows: np.ndarray = logits.numpy()
    return rows


def _from_folder(source: Path) -> Any:
    """The model of a Hugging Face folder, without our reader. Raises ModelError when a weight is missing."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = LlamaForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
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


def _from_tensors(checkpoint: CheckpointLike) -> Any:
    """The model with the checkpoint's tensors in place of its parameters: nothing is initialised or copied twice."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig.from_dict(checkpoint.config.to_hf_dict(), attn_implementation="eager")
    state = {name: tensor.to(torch.float32) for name, tensor in checkpoint.tensors.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    # NOTE: rotary frequencies are not part of a checkpoint; those made on the meta device have no values.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model
