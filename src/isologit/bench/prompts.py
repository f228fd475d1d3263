"""Which requests a load run sends: built-in prompts or a file's, and others to warm the server up with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from isologit.bench.dialects import LoadRequest
from isologit.bench.options import ServingOptions
from isologit.errors import ConfigError, DatasetError, ModelError
from isologit.text.tokenizer import Tokenizer, load_tokenizer
from isologit.workload import DEMO_NAME, BadRequest, RequestSpec, builtin_requests, demo_model_path, load_dataset

DEMO = "built-in demo"
_WARMUP_SEED_OFFSET = 7_000_003


def find_tokenizer(
    tokenizer: Path | None, model: str | None, served: Sequence[str] = ()
) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer that counts tokens, and its name in the result.

    It is the one asked for, else that of the model's folder, else the demo model's for a server that names the demo
    model. A model known by name only has none: another model's tokenizer would count wrongly. served: names of the
    server's models. Raises ModelError.
    """
    if tokenizer is not None:
        found = load_tokenizer(tokenizer)
        if found is None:
            raise ModelError(f"{tokenizer}: holds no tokenizer.json or tokenizer.model; give the model's own folder")
        return found, str(tokenizer)
    if model is None and DEMO_NAME in served:
        return load_tokenizer(demo_model_path()), DEMO
    if model is None or not Path(model).exists():
        return None, None
    found = load_tokenizer(model)
    return found, model if found else None


def timed_requests(options: ServingOptions, tokenizer: Tokenizer | None) -> list[LoadRequest]:
    """The requests of a run, in the order they are sent; a file with too few is gone through again under new ids.

    Raises DatasetError when a record cannot be sent: a load run has no place to leave it out unseen.
    """
    wanted = options.wanted_requests
    if options.dataset_path is None:
        assert wanted is not None
        return [_load_request(spec, tokenizer) for spec in builtin_requests(wanted, options.seed)]
    records = load_dataset(
        options.dataset_path,
        tokenizer,
        limit=wanted,
        default_max_new_tokens=options.max_new_tokens,
        format=options.dataset_format,
    )
    specs = []
    for record in records:
        if isinstance(record, BadRequest):
            raise DatasetError(f"{record.where}: {record.error}; every record of a load run must be sendable")
        if record.prompt is None and not options.dialect.takes_token_ids:
            raise DatasetError(f"{record.where}: token ids can only be sent with --backend openai; give text")
        specs.append(record)
    once = [_load_request(spec, tokenizer) for spec in specs]
    return [_again(once[i % len(once)], i // len(once)) for i in range(wanted or len(once))]


def warmup_requests(count: int, timed: Sequence[LoadRequest], seed: int) -> list[LoadRequest]:
    """Built-in prompts of another seed, none of which is timed, so that no cache is warmed for the timed ones."""
    used = {request.prompt for request in timed}
    spare = (
        spec for spec in builtin_requests(count + len(used), seed + _WARMUP_SEED_OFFSET) if spec.prompt not in used
    )
    chosen = [_load_request(spec, None) for spec in islice(spare, count)]
    if len(chosen) < count:
        raise ConfigError(f"only {len(chosen)} warm-up prompts are not timed as well; lower --num-warmups")
    return chosen


def _load_request(spec: RequestSpec, tokenizer: Tokenizer | None) -> LoadRequest:
    if spec.prompt_token_ids is not None:
        length: int | None = len(spec.prompt_token_ids)
    else:
        length = None if tokenizer is None else len(tokenizer.encode(spec.prompt or ""))
    prompt = None if spec.prompt_token_ids is not None else spec.prompt
    return LoadRequest(spec.id, prompt, spec.prompt_token_ids, length, spec.max_new_tokens)


def _again(request: LoadRequest, cycle: int) -> LoadRequest:
    if cycle == 0:
        return request
    return LoadRequest(
        f"{request.id}~{cycle}",
        request.prompt,
        request.prompt_token_ids,
        request.prompt_len,
        request.max_new_tokens,
    )
