"""The reference: Hugging Face `LlamaForCausalLM`, eager attention, float32, one request at a time.

Code from outside on purpose. It does not know how a run was made, nor what a verdict is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from isologit.fidelity.outside import CheckpointLike, exact_products, load_llama, versions

NOISE_STEPS = 16
NOISE_BATCH = 4
_PAD = 0  # padded positions are masked, so any id of the vocabulary will do

Sample = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of its output; neither is empty."""


@dataclass(frozen=True)
class NoiseFloor:
    """How far the reference is from itself when only shapes change: largest difference over `rows` pairs of rows."""

    max_abs: float
    rows: int
    batch_size: int


def noise_samples(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of middle length that a noise floor is measured on."""
    by_length = sorted(samples, key=lambda sample: len(sample[0]) + len(sample[1]))
    start = max(0, (len(by_length) - NOISE_BATCH) // 2)
    return by_length[start : start + NOISE_BATCH]


class Reference:
    """The model as a plain user of transformers runs it, all of it in memory.

    checkpoint: a Hugging Face folder is read by transformers' own `from_pretrained`, so that not even our reader is
    shared; anything else (another kind, or a weights file without its folder) is built from the checkpoint's
    configuration and tensors. device: where it computes. dtype: weights are widened to float32, the only dtype that a
    certificate may rest on; a timed baseline may take the stored one. num_threads: torch threads while a method runs;
    None leaves them as they are.

    Raises ModelError when the checkpoint does not fit `LlamaForCausalLM`.
    """

    def __init__(
        self,
        checkpoint: CheckpointLike,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_threads: int | None = None,
    ) -> None:
        self._num_threads = num_threads
        model, self._loaded_by = load_llama(checkpoint, dtype)
        self._model: Any = model.to(device).eval()
        self._device = device
        self.vocab_size = int(self._model.config.vocab_size)

    def identity(self) -> dict[str, str]:
        """What the reference is, with versions."""
        return {
            "class": type(self._model).__name__,
            "attention": str(self._model.config._attn_implementation),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "batch": "one request at a time",
            "how": "whole model in memory",
            "device": self._device,
            "loaded_by": self._loaded_by,
            **versions(),
        }

    def score_all(
        self,
        samples: Sequence[Sample],
        *,
        time_budget_s: float | None = None,
        on_progress: Callable[[float, int], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """`score` of the first samples, in order, until the budget is used up; of one at least.

        on_progress(done, of) is told how many are done, and of how many.
        """
        start = time.perf_counter()
        for done, (prompt, tokens) in enumerate(samples, 1):
            yield self.score(prompt, tokens)
            if on_progress is not None:
                on_progress(done, len(samples))
            if time_budget_s is not None and time.perf_counter() - start >= time_budget_s:
                return

    def score(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> np.ndarray:
        """float32 [n, vocab]: row i is the one that chooses output token i, given the output tokens before it.

        One forward pass over prompt and output (teacher forcing); only the n rows wanted go through the LM head.
        Both lists must not be empty.
        """
        fed = self._ids([[*prompt_token_ids, *token_ids[:-1]]])  # [1, p + n - 1]
        with self._computing():
            logits = self._model(input_ids=fed, use_cache=False, logits_to_keep=len(token_ids)).logits
        return as_rows(logits[0])

    def hidden(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> np.ndarray:
        """float32 [n, hidden]: what the LM head reads for the rows of `score`."""
        fed = self._ids([[*prompt_token_ids, *token_ids[:-1]]])  # [1, p + n - 1]
        with self._computing():
            found = self._model.model(input_ids=fed, use_cache=False).last_hidden_state
        return as_rows(found[0, -len(token_ids) :])

    def head_weight(self) -> np.ndarray:
        """float32 [vocab, hidden] of the LM head."""
        return as_rows(self._model.lm_head.weight.detach())

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        eos_token_ids: Collection[int] = (),
        *,
        ignore_eos: bool = False,
        forced: Sequence[int] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Greedy output tokens with transformers' own key-value cache; the last one is EOS if the model ended.

        This is the timed baseline. It is the loop of `model.generate(do_sample=False)` without its bookkeeping: the
        prompt once, then one token a step, and only the last position through the LM head. Both gave the same
        tokens and the same speed within 4 % (4.3 to 4.9 ms a token on two cores, 3.3 million parameters).

        forced: output tokens to feed instead of the argmax (replay); the computation is the same, EOS does not end it,
        and `max_tokens` is not used. on_token(count) is called after each.
        """
        num_steps = max_tokens if forced is None else len(forced)
        stop = frozenset() if ignore_eos or forced is not None else frozenset(eos_token_ids)
        cache, fed = self._empty_cache(), prompt_token_ids
        chosen: list[int] = []
        with self._computing():
            for step in range(num_steps):
                token = int(self._step(fed, cache).argmax())
                chosen.append(token if forced is None else forced[step])
                if on_token is not None:
                    on_token(len(chosen))
                if token in stop:
                    break
                fed = chosen[-1:]
        return chosen

    def noise_floor(self, samples: Sequence[Sample]) -> NoiseFloor:
        """Compare the reference with itself: `score` against other shapes of the same computation.

        samples: (prompt, output tokens) pairs, at least one. They are run together in a right-padded, masked batch
        (repeated when there are fewer than four), and the first few tokens of the first one by one.
        """
        samples = samples[:NOISE_BATCH]
        batch = PaddedBatch(samples)
        with self._computing():
            together = self._model(
                input_ids=batch.token_ids.to(self._device),
                attention_mask=batch.mask.to(self._device),
                use_cache=False,
                logits_to_keep=batch.num_kept,
            ).logits
        prompt, tokens = samples[0]
        steps = self._one_by_one(prompt, tokens[:NOISE_STEPS])
        return measure_noise(batch, together, steps, [self.score(*sample) for sample in samples])

    def _one_by_one(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> np.ndarray:
        """The rows of `score`, one decode step each."""
        cache, fed = self._empty_cache(), prompt_token_ids
        found = []
        with self._computing():
            for token in token_ids:
                found.append(as_rows(self._step(fed, cache)))
                fed = [token]
        return np.stack(found)

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _step(self, fed: Sequence[int], cache: Any) -> torch.Tensor:
        """float32 [vocab]: the row after the last of the tokens fed."""
        ids = self._ids([list(fed)])  # [1, p], later [1, 1]
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        row: torch.Tensor = logits[0, -1]
        return row

    def _ids(self, token_ids: list[list[int]]) -> torch.Tensor:
        return torch.tensor(token_ids, device=self._device)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._num_threads or before)
        try:
            with exact_products(), torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)


class PaddedBatch:
    """Samples beside each other, padded on the right and masked; repeated when there are fewer than four.

    token_ids, mask: int64 [4, longest + 1], so that there is one column of padding at least. num_kept: columns at the
    end that hold every row wanted.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        chosen = list(islice(cycle(samples), NOISE_BATCH))
        lengths = [len(prompt) + len(tokens) - 1 for prompt, tokens in chosen]
        self.token_ids = torch.full((len(chosen), max(lengths) + 1), _PAD)
        self.mask = torch.zeros_like(self.token_ids)
        for i, (prompt, tokens) in enumerate(chosen):
            self.token_ids[i, : lengths[i]] = torch.tensor([*prompt, *tokens[:-1]])
            self.mask[i, : lengths[i]] = 1
        self._first = min(len(prompt) for prompt, _ in chosen) - 1
        self.num_kept = self.token_ids.shape[1] - self._first

    def rows(self, logits: torch.Tensor) -> Iterator[np.ndarray]:
        """The rows float32 [n, vocab] of each sample, out of the batch's float32 [4, num_kept, vocab]."""
        for i, (prompt, tokens) in enumerate(self._samples[: len(logits)]):
            start = len(prompt) - 1 - self._first
            yield as_rows(logits[i, start : start + len(tokens)])


def measure_noise(
    batch: PaddedBatch, together: torch.Tensor, steps: np.ndarray, alone: Sequence[np.ndarray]
) -> NoiseFloor:
    """The floor, from the logits of the padded batch, the first rows of the first sample made step by step, and the
    rows of every sample made alone.
    """
    pairs = [(steps, alone[0]), *zip(batch.rows(together), alone, strict=True)]
    worst = max(0.0, *(float(np.abs(other - own[: len(other)]).max()) for other, own in pairs))
    return NoiseFloor(worst, sum(len(other) for other, _ in pairs), NOISE_BATCH)


def as_rows(logits: torch.Tensor) -> np.ndarray:
    """A tensor of any device as an array."""
    rows: np.ndarray = logits.cpu().numpy()
    return rows
