"""The reference for a model that does not fit in memory in float32: one pass over the checkpoint, a layer at a time.

transformers' own modules compute, with the shapes of the whole reference, so every row is the whole reference's bit for
bit. It does not know how a run was made, nor what a verdict is.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from isologit.errors import ModelError
from isologit.fidelity.outside import (
    CheckpointLike,
    FolderTensors,
    exact_products,
    is_folder,
    llama_config,
    naming,
    versions,
)
from isologit.fidelity.reference import (
    NOISE_STEPS,
    NoiseFloor,
    PaddedBatch,
    Sample,
    as_rows,
    measure_noise,
    noise_samples,
)

STATES_BYTES = 1 << 30
"""Most memory for what is carried from layer to layer."""

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclass
class _Lane:
    """A computation that goes through the layers beside others, and never together with them.

    state: float32 [batch, tokens, hidden]. mask: int64 [batch, tokens], 0 for padding, or None. steps: how many tokens
    at the end are computed one by one, after the others, with a key-value cache.
    """

    state: torch.Tensor
    mask: torch.Tensor | None = None
    steps: int = 0


class _Noise:
    """What the noise floor of some samples adds to a pass: a padded batch of them, and the first one step by step."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = noise_samples(samples)
        self.batch = PaddedBatch(self.samples)
        prompt, tokens = self.samples[0]
        self.steps = tokens[:NOISE_STEPS]
        self.step_ids = torch.tensor([[*prompt, *self.steps[:-1]]])
        self.num_tokens = self.batch.token_ids.numel() + self.step_ids.numel()


class StreamedReference:
    """As `Reference`, for scoring: the same rows bit for bit, with two layers (or the LM head) in memory at a time.

    Weights are widened to float32 as they are loaded; the next layer is read while one computes. Every sample is
    computed alone. Raises ModelError when the checkpoint does not fit `LlamaForCausalLM`.
    """

    def __init__(self, checkpoint: CheckpointLike, *, device: str = "cpu") -> None:
        from transformers import LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self._checkpoint = checkpoint
        self._device = torch.device(device)
        with naming(checkpoint), torch.device("meta"):
            self._config = llama_config(checkpoint)
            model = LlamaForCausalLM(self._config)
        self._class = type(model).__name__
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if self._config.tie_word_embeddings:
            self._shapes.pop(_HEAD)
        self._own_reader = not is_folder(checkpoint)
        with naming(checkpoint):
            self._tensors: Mapping[str, torch.Tensor] = (
                checkpoint.tensors if self._own_reader else FolderTensors(checkpoint.source)
            )
        if missing := sorted(self._shapes.keys() - self._tensors.keys()):
            raise ModelError(
                f"{checkpoint.source}: {missing[0]} is missing ({len(missing)} such weights); repair the model"
            )
        self._rotary = LlamaRotaryEmbedding(self._config).to(self._device)
        self.vocab_size = int(self._config.vocab_size)
        self._floor: tuple[list[Sample], NoiseFloor] | None = None  # what the last pass measured on its way

    def identity(self) -> dict[str, str]:
        """What the reference is, with versions."""
        return {
            "class": self._class,
            "attention": str(self._config._attn_implementation),
            "dtype": "float32",
            "batch": "one request at a time",
            "how": "streamed from the checkpoint, one layer at a time",
            "device": str(self._device),
            "loaded_by": "checkpoint tensors" if self._own_reader else "safetensors",
            **versions(),
        }

    def score(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> np.ndarray:
        """As `Reference.score`; a whole pass over the weights for one sample."""
        (rows,) = self.score_all([(prompt_token_ids, token_ids)])
        return rows

    def score_all(
        self,
        samples: Sequence[Sample],
        *,
        time_budget_s: float | None = None,
        on_progress: Callable[[float, int], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """As `Reference.score_all`, in one pass over the weights.

        A pass cannot end early, so how many samples it carries is chosen once the first layer has shown what reading it
        and computing a token cost: as many as are predicted to fit the budget (one at least, whatever reading costs)
        and whose states fit STATES_BYTES. on_progress(done, of) counts a layer of every sample as a fraction of all.
        """
        tell = on_progress or (lambda done, of: None)
        with exact_products(), torch.inference_mode():
            samples, lanes, noise, noise_lanes = self._run_layers(samples, time_budget_s, tell)
            head = self._load_head()
            alone = {id(sample): lane for sample, lane in zip(samples, lanes, strict=True)}
            together, stepped = (lane.state for lane in noise_lanes)
            floor = measure_noise(
                noise.batch,
                head(together[:, -noise.batch.num_kept :]),
                np.concatenate([as_rows(head(stepped[:, i, None])[0]) for i in range(-len(noise.steps), 0)]),
                [self._rows(head, sample, alone[id(sample)]) for sample in noise.samples],
            )
            self._floor = noise.samples, floor
            del noise_lanes, together, stepped
        for done, (sample, lane) in enumerate(zip(samples, lanes, strict=True), 1):
            with exact_products(), torch.inference_mode():
                rows = self._rows(head, sample, lane)
            yield rows
            tell(done, len(samples))

    def noise_floor(self, samples: Sequence[Sample]) -> NoiseFloor:
        """As `Reference.noise_floor`. A pass measures it for the `noise_samples` of what it scores."""
        if self._floor is None or self._floor[0] != list(samples):
            for _ in self.score_all(samples):
                pass
        assert self._floor is not None
        return self._floor[1]

    @staticmethod
    def _rows(head: Any, sample: Sample, lane: _Lane) -> np.ndarray:
        """float32 [n, vocab] of a sample alone."""
        return as_rows(head(lane.state[:, -len(sample[1]) :])[0])

    def _run_layers(
        self, samples: Sequence[Sample], time_budget_s: float | None, tell: Callable[[float, int], None]
    ) -> tuple[Sequence[Sample], list[_Lane], _Noise, list[_Lane]]:
        """The samples chosen and their lanes after the last norm, and the noise floor's."""
        num_layers = int(self._config.num_hidden_layers)
        start = time.perf_counter()
        modules = [self._empty_layer(), self._empty_layer()]
        self._fill_layer(modules[0], 0)
        read_s = time.perf_counter() - start
        samples = samples[: self._num_affordable(samples, modules[0], read_s, time_budget_s)]
        noise = _Noise(samples)
        lanes, noise_lanes = self._embed(samples, noise)
        every = [*lanes, *noise_lanes]
        with ThreadPoolExecutor(1, "reference-reader") as reader:
            for layer in range(num_layers):
                following = layer + 1
                if following < num_layers:
                    ready = reader.submit(self._fill_layer, modules[following % 2], following)
                for i, lane in enumerate(every, 1):
                    self._advance(lane, modules[layer % 2])
                    tell(len(samples) * (layer + i / len(every)) / (num_layers + 1), len(samples))
                if following < num_layers:
                    ready.result()
        norm = self._load_norm()
        for lane in every:
            lane.state = norm(lane.state)
        return samples, lanes, noise, noise_lanes

    def _num_affordable(
        self, samples: Sequence[Sample], module: Any, read_s: float, time_budget_s: float | None
    ) -> int:
        """How many of the first samples a pass may carry: one, and more if their states and the budget allow."""
        hidden = int(self._config.hidden_size)
        most_tokens = STATES_BYTES / (4 * hidden)
        if time_budget_s is not None:
            probe = _Lane(torch.randn(1, _num_fed(samples[0]), hidden, device=self._device))
            start = time.perf_counter()
            self._advance(probe, module)
            as_rows(probe.state[0, -1])  # waits for a device
            per_token_s = (time.perf_counter() - start) / probe.state.shape[1]
            layer_s = time_budget_s / int(self._config.num_hidden_layers)
            most_tokens = min(most_tokens, (layer_s - read_s) / per_token_s)

        def num_tokens(count: int) -> int:
            return sum(map(_num_fed, samples[:count])) + _Noise(samples[:count]).num_tokens

        return 1 + bisect_right(range(2, len(samples) + 1), most_tokens, key=num_tokens)

    def _embed(self, samples: Sequence[Sample], noise: _Noise) -> tuple[list[_Lane], list[_Lane]]:
        """The lanes of the samples, and the two of the noise floor, before the first layer."""
        table = self._load(_EMBEDDING)

        def look_up(token_ids: torch.Tensor) -> torch.Tensor:
            return table[token_ids].to(self._device, torch.float32)

        lanes = [_Lane(look_up(torch.tensor([[*prompt, *tokens[:-1]]]))) for prompt, tokens in samples]
        together = _Lane(look_up(noise.batch.token_ids), mask=noise.batch.mask.to(self._device))
        return lanes, [together, _Lane(look_up(noise.step_ids), steps=len(noise.steps) - 1)]

    def _advance(self, lane: _Lane, module: Any) -> None:
        """One layer further. NOTE: shapes and masks are those that `LlamaModel.forward` gives its layers."""
        from transformers import DynamicCache

        length = lane.state.shape[1]
        cache = DynamicCache(config=self._config) if lane.steps else None
        ends = [length - lane.steps, *range(length - lane.steps + 1, length + 1)]
        done, parts = 0, []
        for end in ends:
            parts.append(self._apply(module, lane.state[:, done:end], done, lane.mask, cache))
            done = end
        lane.state = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _apply(
        self, module: Any, state: torch.Tensor, first: int, mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """One layer on the tokens from position `first` on."""
        from transformers.masking_utils import create_causal_mask

        positions = torch.arange(first, first + state.shape[1], device=self._device)[None]
        causal = create_causal_mask(
            config=self._config,
            inputs_embeds=state,
            attention_mask=mask,
            past_key_values=cache,
            position_ids=positions,
        )
        out: torch.Tensor = module(
            state,
            attention_mask=causal,
            position_embeddings=self._rotary(state, position_ids=positions),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out

    def _empty_layer(self) -> Any:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        with torch.device("meta"):
            layer = LlamaDecoderLayer(self._config, 0)
        return layer.to_empty(device=self._device).float().eval()

    def _fill_layer(self, module: Any, layer: int) -> None:
        self._fill(module, f"model.layers.{layer}.")

    def _load_norm(self) -> Any:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        norm = LlamaRMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps).to(self._device)
        self._fill(norm, "model.norm.")
        return norm

    def _load_head(self) -> Any:
        """The LM head, widened; a tied one is the embedding."""
        name = _EMBEDDING if self._config.tie_word_embeddings else _HEAD
        with torch.device("meta"):
            head = torch.nn.Linear(self._config.hidden_size, self._config.vocab_size, bias=False)
        head = head.to_empty(device=self._device)
        self._fill(head, name.removesuffix("weight"))
        return head

    def _fill(self, module: Any, prefix: str) -> None:
        """Load a module's parameters, widened to float32 where they are to be."""
        with torch.inference_mode():  # of this thread
            for name, parameter in module.named_parameters():
                parameter.copy_(self._load(prefix + name))

    def _load(self, name: str) -> torch.Tensor:
        """A weight as it is stored. Raises ModelError when it cannot be read or has another shape."""
        with naming(self._checkpoint):
            tensor = self._tensors[name]
        if tuple(tensor.shape) != self._shapes[name]:
            raise ModelError(
                f"{self._checkpoint.source}: {name} has shape {list(tensor.shape)}, not {list(self._shapes[name])}; "
                "repair the model"
            )
        return tensor


def _num_fed(sample: Sample) -> int:
    """Tokens that are fed to score a sample."""
    prompt, tokens = sample
    return len(prompt) + len(tokens) - 1
