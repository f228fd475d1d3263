"""The model and the requests of a run before anything is loaded: what its memory is planned from."""

from __future__ import annotations

import os
import sys

from isologit.common.memory import FreeMemory, free_memory, resident_bytes
from isologit.config import ModelConfig
from isologit.engine.request import GenerationRequest
from isologit.engine.request_limits import RequestLimits
from isologit.job.memory_plan import MemoryPlan, plan_memory
from isologit.job.options import RunOptions
from isologit.job.preprocess import preprocess
from isologit.job.proof import num_captured_rows
from isologit.llm import open_draft_model, open_model
from isologit.text.tokenizer import Tokenizer, load_tokenizer


class UnloadedModel:
    """Configuration and tokenizer of the model that these options name. Raises ModelError."""

    def __init__(self, options: RunOptions) -> None:
        checkpoint = open_model(options.engine)
        self.config: ModelConfig = checkpoint.config
        self.tokenizer: Tokenizer | None = load_tokenizer(options.engine.tokenizer or checkpoint.source)

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError for what cannot run whatever memory there is."""
        RequestLimits(
            max_model_len=self.config.context_length,
            max_kv_tokens=sys.maxsize,
            vocab_size=self.config.vocab_size,
            has_tokenizer=self.tokenizer is not None,
        ).check_request(request)


def plan_run(options: RunOptions) -> MemoryPlan:
    """The memory of this run. Raises ModelError, ConfigError or DatasetError for what could not run anyway."""
    model = UnloadedModel(options)
    prepared = preprocess(options, model)
    draft = open_draft_model(options.engine)
    free = free_memory()
    return plan_memory(
        options.engine,
        model.config,
        [(len(request.prompt_token_ids), request.params.max_tokens) for request in prepared.requests],
        FreeMemory(free.nbytes + resident_bytes(), free.limited_by),
        num_threads=options.engine.num_threads or len(os.sched_getaffinity(0)),
        draft=None if draft is None else draft.config,
        captured_rows=num_captured_rows(prepared.max_tokens, options, model.config.vocab_size),
        baseline=options.baseline_requests != 0,
    )
