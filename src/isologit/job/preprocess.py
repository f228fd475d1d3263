"""Prompts into requests: read, join with a recorded trace, tokenise, check. Knows nothing of files that are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from isologit.config import ModelConfig
from isologit.engine.request import GenerationRequest, SamplingParams
from isologit.errors import DatasetError, RequestError
from isologit.job.options import RunOptions
from isologit.text.tokenizer import Tokenizer, load_tokenizer
from isologit.workload import BadRequest, RequestSpec, builtin_requests, demo_model_path, load_dataset, load_replay


class Model(Protocol):
    """What requests are checked against: an engine, or a model that is not loaded yet."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    def check(self, request: GenerationRequest) -> None: ...


@dataclass(frozen=True)
class Prepared:
    """The requests that can run; `order` has the dataset's order: their ids, and between them those that never can."""

    requests: list[GenerationRequest]
    order: list[str | BadRequest]

    @property
    def refused(self) -> list[BadRequest]:
        """Requests that never can run."""
        return [entry for entry in self.order if isinstance(entry, BadRequest)]

    @property
    def max_tokens(self) -> dict[str, int]:
        """The longest possible output of every request that can run."""
        return {request.request_id: request.params.max_tokens for request in self.requests}

    def with_capture(self, plan: Mapping[str, frozenset[int]]) -> Prepared:
        """The same, with requests told which logits rows to keep."""
        requests = [replace(r, capture=plan.get(r.request_id, frozenset())) for r in self.requests]
        return replace(self, requests=requests)

    def sha256(self) -> str:
        """Hash of everything that decides what is computed: ids, token ids, lengths and replayed tokens."""
        digest = hashlib.sha256()
        for request in self.requests:
            params = request.params
            parts = [
                request.request_id,
                request.prompt_token_ids,
                params.max_tokens,
                params.ignore_eos,
                request.replay_token_ids,
            ]
            digest.update(json.dumps(parts).encode() + b"\n")
        return digest.hexdigest()


def preprocess(options: RunOptions, model: Model) -> Prepared:
    """Read the dataset and check every request.

    Raises DatasetError when the file cannot be read, when the replay file lacks a request, or when nothing can run.
    """
    tokenizer = _tokenizer(options, model)
    listed = _read(options, tokenizer)
    replay = None if options.replay is None else load_replay(options.replay, tokenizer)
    requests: list[GenerationRequest] = []
    order: list[str | BadRequest] = []
    for entry in listed:
        if isinstance(entry, BadRequest):
            order.append(entry)
            continue
        try:
            request = _request(entry, options, model, tokenizer, replay)
            model.check(request)
        except RequestError as error:
            order.append(BadRequest(entry.id, entry.where, str(error), entry.prompt))
        else:
            requests.append(request)
            order.append(entry.id)
    prepared = Prepared(requests, order)
    if not requests:
        source = options.dataset_file or "the built-in prompts"
        refused = prepared.refused
        why = (
            f"none of its {len(refused)} requests can run; {refused[0].where}: {refused[0].error}"
            if refused
            else "holds no request"
        )
        raise DatasetError(f"{source}: {why}")
    return prepared


def _tokenizer(options: RunOptions, model: Model) -> Tokenizer | None:
    """What makes prompts into tokens. A model that has no tokenizer and never saw text can take any, the demo's too."""
    if model.tokenizer is None and (options.dataset_file is None or options.engine.load_format == "dummy"):
        return load_tokenizer(demo_model_path())
    return model.tokenizer


def _read(options: RunOptions, tokenizer: Tokenizer | None) -> list[RequestSpec | BadRequest]:
    file = options.dataset_file
    if file is not None:
        return load_dataset(
            file,
            tokenizer,
            limit=options.limit,
            default_max_new_tokens=options.max_new_tokens,
            format=options.dataset_format,
        )
    return list(builtin_requests() if options.limit is None else builtin_requests(options.limit))


def _request(
    spec: RequestSpec,
    options: RunOptions,
    model: Model,
    tokenizer: Tokenizer | None,
    replay: Mapping[str, list[int]] | None,
) -> GenerationRequest:
    forced = None
    if replay is not None:
        if spec.id not in replay:
            raise DatasetError(f"{options.replay}: has no answer to request {spec.id}; record it, or use --limit")
        # An answer without text was ended at once; one without even a token to say so cannot be replayed.
        forced = replay[spec.id] or list(model.config.eos_token_ids[:1])
        if not forced:
            raise RequestError(f"request {spec.id}: its recorded answer is empty; record at least one token")
    ids = spec.prompt_token_ids
    if ids is None:
        if tokenizer is None:
            raise DatasetError(
                f"{spec.where}: the prompt is text and the model has no tokenizer; name one with --tokenizer"
            )
        ids = tokenizer.encode(spec.prompt) if spec.prompt else []
    length = spec.max_new_tokens if forced is None else len(forced)
    params = SamplingParams(max_tokens=length, ignore_eos=options.ignore_eos)
    return GenerationRequest(spec.id, list(ids), params, prompt=spec.prompt, replay_token_ids=forced)
