"""The offline API: `LLM(model).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isologit.backends.base import Backend, LoadOptions, scheme_name
from isologit.backends.registry import choose_backend, load_backend
from isologit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from isologit.checkpoints.dummy import dummy_checkpoint
from isologit.common.load_progress import OnLoadProgress
from isologit.config import EngineOptions, ModelConfig, SpeculativeConfig, load_model_config
from isologit.config.engine_options import QkvLayout
from isologit.engine.blocks import BlockPool
from isologit.engine.calibration import CALIBRATION_ROWS, StepTimes, measure_step_cost, measure_step_times
from isologit.engine.draft_model import DraftModelProposer
from isologit.engine.kv_sizes import most_blocks, prepared_blocks, run_blocks
from isologit.engine.loop import EngineLoop
from isologit.engine.planner import Plan, StepCost, plan
from isologit.engine.request import GenerationRequest, RequestMetrics, RequestOutput, SamplingParams
from isologit.engine.request_limits import RequestLimits
from isologit.engine.runner import Runner
from isologit.engine.scheduler import Scheduler, SchedulerConfig
from isologit.engine.speculation import NGramProposer, Proposer
from isologit.engine.step_record import StepRecord
from isologit.errors import ModelError, RequestError
from isologit.text.tokenizer import Tokenizer, load_tokenizer
from isologit.workload import demo_model_path

Prompt = str | Mapping[str, Any]

_OPEN_SLOTS, _OPEN_ROWS = 128, 512  # of a loop whose requests are not known, unless the options say otherwise


class LLM:
    """A model, ready to generate.

    Takes `EngineOptions`, or the model and any of their fields by name: `LLM("path", max_num_seqs=64)`; a
    `speculative_config` may be a dictionary. `on_load_progress` is told how far loading is. Weights are float32 or
    widened exactly to it; all arithmetic is float32.

    Raises ModelError for a checkpoint that cannot be loaded, ConfigError for invalid options.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        options: EngineOptions | None = None,
        on_load_progress: OnLoadProgress | None = None,
        **fields: Any,
    ) -> None:
        if model is not None:
            fields["model"] = str(model)
        if isinstance(fields.get("speculative_config"), Mapping):
            fields["speculative_config"] = SpeculativeConfig(**fields["speculative_config"])
        self.options = options = replace(options or EngineOptions(), **fields)
        self.checkpoint = open_model(options)
        self.config: ModelConfig = self.checkpoint.config
        self.tokenizer: Tokenizer | None = load_tokenizer(options.tokenizer or self.checkpoint.source)
        self.num_threads = options.num_threads or len(os.sched_getaffinity(0))
        self.max_model_len = self.config.context_length
        self._load_options = LoadOptions(
            self.max_model_len,
            self.num_threads,
            device=options.device,
            weight_cache=options.weight_cache,
            kv_cache_memory_bytes=options.kv_cache_memory_bytes,
            numerics=options.numerics,
            on_progress=on_load_progress,
        )
        self._model = self._load(self.checkpoint)
        self._draft = self._load_draft()
        self._models = [self._model] if self._draft is None else [self._model, self._draft]
        self.max_kv_blocks = most_blocks(
            self._model.free_memory(), self._kv_bytes_per_block(), options.kv_cache_memory_bytes
        )
        self._num_kv_blocks = self._reserved_tokens = 0
        self._measured: tuple[list[StepTimes], StepCost] | None = None
        self._loop: EngineLoop | None = None
        self.last_plan: Plan | None = None
        self.step_records: list[StepRecord] = []

    def _load(self, checkpoint: Checkpoint) -> Backend:
        return load_backend(checkpoint, self._load_options, backend=self.options.backend)

    def _load_draft(self) -> Backend | None:
        """The draft model, if one is asked for. Raises ModelError when its vocabulary is another one."""
        name, checkpoint = self.options.draft_model, open_draft_model(self.options)
        if checkpoint is None:
            return None
        if checkpoint.config.vocab_size != self.config.vocab_size:
            raise ModelError(
                f"{name}: a draft model needs the vocabulary of the model it drafts for, but it has "
                f"{checkpoint.config.vocab_size} tokens instead of {self.config.vocab_size}"
            )
        return self._load(checkpoint)

    def _kv_bytes_per_block(self) -> int:
        return sum(model.memory().kv_block for model in self._models)

    def close(self) -> None:
        """Free threads, weights, keys and values; nothing can run or be described afterwards. May be called twice."""
        for model in self._models:
            model.close()
        self._models, self._draft = [], None

    # -- what can run ---------------------------------------------------------------------------------------------

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError when the request can never run on this model."""
        self.limits.check_request(request)

    @property
    def limits(self) -> RequestLimits:
        """What a request may be."""
        return RequestLimits(
            max_model_len=self.max_model_len,
            max_kv_tokens=self.max_kv_blocks * self._model.block_size,
            vocab_size=self.config.vocab_size,
            has_tokenizer=self.tokenizer is not None,
        )

    def _blocks_of(self, request: GenerationRequest) -> int:
        tokens = len(request.prompt_token_ids) + request.params.max_tokens - 1
        return -(-tokens // self._model.block_size)

    # -- generating -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for every prompt and return the outputs in the order of the prompts.

        A prompt is a string or `{"prompt_token_ids": [...]}`; `sampling_params` is one for all or one each. Raises
        RequestError if a prompt can never run. `use_tqdm` shows a progress bar when standard error is a terminal.
        """
        listed = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(listed)
        else:
            params = list(sampling_params)
        if len(params) != len(listed):
            raise RequestError(
                f"{len(listed)} prompts but {len(params)} sampling_params; give one each, or one for all"
            )
        requests = [self.make_request(str(i), p, s) for i, (p, s) in enumerate(zip(listed, params, strict=True))]
        outputs: dict[str, RequestOutput] = {}
        for output in _with_progress(self.run(requests), len(requests), use_tqdm and sys.stderr.isatty()):
            outputs[output.request_id] = output
        return [outputs[request.request_id] for request in requests]

    def make_request(self, request_id: str, prompt: Prompt, params: SamplingParams) -> GenerationRequest:
        """A request from a string or `{"prompt_token_ids": [...]}`."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError('this model has no tokenizer; give {"prompt_token_ids": [...]} instead of text')
            if not prompt:
                raise RequestError(f"request {request_id}: the prompt is empty; give at least one character")
            return GenerationRequest(request_id, self.tokenizer.encode(prompt), params, prompt=prompt)
        if not isinstance(prompt, Mapping) or "prompt_token_ids" not in prompt:
            raise RequestError(f'request {request_id}: a prompt is a string or {{"prompt_token_ids": [...]}}')
        text = prompt.get("prompt")
        return GenerationRequest(request_id, [int(i) for i in prompt["prompt_token_ids"]], params, prompt=text)

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[RequestOutput]:
        """Run known requests with a plan made for them; yields each as it finishes. The prefix cache starts empty.

        Raises RequestError before any work if one request can never run or an id appears twice.
        """
        queue = list(requests)
        seen: set[str] = set()
        for request in queue:
            self.check(request)
            if request.request_id in seen:
                raise RequestError(f"request id {request.request_id} appears twice; ids must be unique")
            seen.add(request.request_id)
        return self._run(queue)

    def _run(self, queue: list[GenerationRequest]) -> Iterator[RequestOutput]:
        zero = time.perf_counter()
        self.step_records = []
        self._model.reset_phases()
        if not queue:
            return
        chosen = self.last_plan = self.plan(queue)
        loop = self._loop = self._make_loop(queue, chosen, zero)
        self.step_records = loop.step_records
        arrival_s = loop.now()
        for request in queue:
            loop.add(request, arrival_s=arrival_s)
        try:
            while loop.has_work():
                yield from loop.step()
        finally:
            self._loop = None

    def abort(self, request_id: str) -> RequestOutput | None:
        """Cancel a request of the run in progress; returns what it had, or None if it is not running."""
        return None if self._loop is None else self._loop.abort(request_id)

    def plan(self, requests: Sequence[GenerationRequest]) -> Plan:
        """Slots, token budget, order, and predicted steps and seconds for these requests."""
        options = self.options
        _, cost = self._calibrated()
        lengths = [(len(r.prompt_token_ids), _expected_tokens(r)) for r in requests]
        return plan(
            lengths,
            num_blocks=self.max_kv_blocks,
            block_size=self._model.block_size,
            cost=cost,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            longest_first=options.longest_first,
        )

    def _make_loop(self, queue: list[GenerationRequest], chosen: Plan, zero_s: float) -> EngineLoop:
        needs = [self._blocks_of(request) for request in queue]
        num_blocks = run_blocks(needs, chosen.max_num_seqs, self.max_kv_blocks)
        return self._loop_of(chosen.max_num_seqs, chosen.max_num_batched_tokens, num_blocks, zero_s)

    def open_loop(self, *, keep_hidden: bool = False) -> EngineLoop:
        """An engine loop for requests that are not known yet, as a server has them.

        keep_hidden: deltas hold what the LM head read for each token.

        `max_num_seqs` and `max_num_batched_tokens` are those of the constructor, else 128 and 512. The loop uses this
        object's memory, so nothing else may run meanwhile.
        """
        options = self.options
        slots = options.max_num_seqs or _OPEN_SLOTS
        rows = options.max_num_batched_tokens or max(slots, _OPEN_ROWS)
        blocks_each = -(-self.max_model_len // self._model.block_size)
        num_blocks = min(self.max_kv_blocks, slots * blocks_each)
        return self._loop_of(slots, rows, num_blocks, time.perf_counter(), streaming=True, keep_hidden=keep_hidden)

    def _loop_of(
        self,
        slots: int,
        rows: int,
        num_blocks: int,
        zero_s: float,
        *,
        streaming: bool = False,
        keep_hidden: bool = False,
    ) -> EngineLoop:
        self._make_room(num_blocks, rows)
        options = self.options
        pool = BlockPool(num_blocks, self._model.block_size, enable_prefix_caching=options.enable_prefix_caching)
        config = SchedulerConfig(
            max_num_seqs=slots,
            max_num_batched_tokens=rows,
            eos_token_ids=self.config.eos_token_ids,
            max_model_len=self.max_model_len,
            vocab_size=self.config.vocab_size,
            longest_first=options.longest_first,
        )
        scheduler = Scheduler(config, pool, self._make_proposer(rows))
        return EngineLoop(
            scheduler,
            Runner(self._model),
            self.tokenizer,
            seed=options.seed,
            zero_s=zero_s,
            raw_logits=options.logprobs_mode == "raw_logits",
            streaming=streaming,
            keep_hidden=keep_hidden,
        )

    def _make_room(self, num_blocks: int, rows: int) -> None:
        """Memory of both models for so many blocks and rows of a step; it only ever grows."""
        for model in self._models:
            if num_blocks > self._num_kv_blocks:
                model.allocate_kv(num_blocks)
            if rows > self._reserved_tokens:
                model.reserve(rows)
        self._num_kv_blocks = max(num_blocks, self._num_kv_blocks)
        self._reserved_tokens = max(rows, self._reserved_tokens)

    def _make_proposer(self, max_rows: int) -> Proposer | None:
        options = self.options.speculative_config
        if options is None:
            return None
        # NOTE: calibration writes into the key/value memory, so it must be over before anything runs.
        (target, *drafts), _ = self._calibrated()

        def draft_cost(rows: int) -> float:
            """One more row of the step, and one of the draft model's steps shared by all."""
            return target.row_cost(rows) + sum(d.seconds_of(rows) for d in drafts) / target.seconds_of(rows)

        longest = options.num_speculative_tokens
        if self._draft is not None:
            return DraftModelProposer(self._draft, draft_cost, max_rows=max_rows, max_draft=longest)
        sizes = {"max_ngram": options.prompt_lookup_max, "min_ngram": options.prompt_lookup_min}
        return NGramProposer(draft_cost, max_draft=longest, **sizes)

    # -- speed ----------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile the kernels, prepare memory, and measure what steps cost (about three seconds once compiled).

        Prepared is key/value memory for 32768 tokens, 2 GiB at most; or all of `kv_cache_memory_bytes`, if given.
        """
        rows = max(1, min(CALIBRATION_ROWS[-1], self.max_kv_blocks))
        ready = prepared_blocks(
            self.max_kv_blocks,
            self._kv_bytes_per_block(),
            self._model.block_size,
            self.options.kv_cache_memory_bytes,
        )
        self._make_room(max(rows, ready), rows)
        vocab_size = self.config.vocab_size
        times = [measure_step_times(model, vocab_size, rows) for model in self._models]
        cost = measure_step_cost(self._model, vocab_size, times[0], self._num_kv_blocks, self.max_model_len)
        self._measured = times, cost

    def _calibrated(self) -> tuple[list[StepTimes], StepCost]:
        """Of the model, and of the draft model if there is one; and what the planner knows of the model."""
        if self._measured is None:
            self.warm_up()
        assert self._measured is not None
        return self._measured

    def phase_seconds(self) -> dict[str, float]:
        """Seconds that the last run's steps spent in each part of the model, waiting between threads included."""
        return self._model.phases()

    def describe(self) -> dict[str, Any]:
        """What runs: slots, budget, dtype, kernels, threads."""
        options, last = self.options, self.last_plan
        return {
            "backend": self._model.name,
            **self._model.describe(),
            "block_size": self._model.block_size,
            "num_kv_blocks": self._num_kv_blocks,
            "kv_bytes": self._num_kv_blocks * self._kv_bytes_per_block(),
            "num_threads": self.num_threads,
            "max_num_seqs": last.max_num_seqs if last else options.max_num_seqs,
            "max_num_batched_tokens": last.max_num_batched_tokens if last else options.max_num_batched_tokens,
            "enable_prefix_caching": options.enable_prefix_caching,
            "order": "longest-first" if options.longest_first else "given",
            "num_speculative_tokens": options.num_speculative_tokens,
            "draft_model": options.draft_model,
        }


def require_backend(options: EngineOptions) -> None:
    """Raise ConfigError when nothing here can run what these options name, before anything is read."""
    scheme_name(options.numerics, choose_backend(options.backend, options.device))


def open_model(options: EngineOptions) -> Checkpoint:
    """The checkpoint that these options name; its weights are read when they are asked for. Raises ModelError."""
    return _open(
        options.model or demo_model_path(), options, config=options.model_config, qkv_layout=options.qkv_layout
    )


def open_draft_model(options: EngineOptions) -> Checkpoint | None:
    """The draft model's checkpoint, if there is one. Raises ModelError."""
    return None if options.draft_model is None else _open(options.draft_model, options)


def _open(
    model: str | Path,
    options: EngineOptions,
    *,
    config: Path | None = None,
    qkv_layout: QkvLayout | None = None,
) -> Checkpoint:
    if options.load_format == "dummy":
        shape = load_model_config(model)
        return dummy_checkpoint(shape, seed=options.seed, dtype=shape.dtype)
    return open_checkpoint(Path(model), config=config, qkv_layout=qkv_layout)


def _expected_tokens(request: GenerationRequest) -> int:
    if request.replay_token_ids is not None:
        return max(1, min(len(request.replay_token_ids), request.params.max_tokens))
    return max(1, request.params.max_tokens)


def _with_progress(outputs: Iterator[RequestOutput], total: int, show: bool) -> Iterator[RequestOutput]:
    if not show:
        yield from outputs
        return
    from rich.progress import track

    yield from track(outputs, total=total, description="requests")


__all__ = ["LLM", "GenerationRequest", "RequestMetrics", "RequestOutput", "SamplingParams"]
