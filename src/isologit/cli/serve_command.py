"""`isologit serve`: options and the contest's YAML in, a server out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from isologit.cli.engine_options import ENGINE_PANEL as _ENGINE
from isologit.cli.engine_options import BackendName, DeviceName, NumericsName
from isologit.cli.exits import reporting_errors
from isologit.config import EngineOptions, speculation
from isologit.errors import ConfigError
from isologit.server.options import ServerOptions

_MODEL = "What is served"
_NETWORK = "Where"
_LIMITS = "Limits"

_ENGINE_DEFAULTS, _DEFAULTS = EngineOptions(), ServerOptions()


def _option(panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **more)


def serve_command(
    model: Annotated[
        str | None, _option(_MODEL, metavar="DIR|FILE|PRESET", help="As for run. Default: the built-in demo model.")
    ] = None,
    tokenizer: Annotated[
        Path | None, _option(_MODEL, metavar="DIR|FILE", help="Tokenizer, when the model's folder has none.")
    ] = None,
    load_format: Annotated[
        Literal["auto", "dummy"], _option(_MODEL, help="dummy: seeded random weights of the model's shape.")
    ] = _ENGINE_DEFAULTS.load_format,
    qkv_layout: Annotated[
        Literal["concat", "interleaved"] | None,
        _option(_MODEL, help="Layout of fused matrices in a MindFormers checkpoint."),
    ] = None,
    served_model_name: Annotated[
        str | None, _option(_MODEL, metavar="NAME", help="Name that clients send. Default: the folder's.")
    ] = None,
    config: Annotated[
        Path | None,
        _option(_MODEL, metavar="YAML", help="The contest's server YAML; options given here overrule it."),
    ] = None,
    host: Annotated[str | None, _option(_NETWORK, metavar="ADDRESS", help=f"Default: {_DEFAULTS.host}.")] = None,
    port: Annotated[
        int | None, _option(_NETWORK, "--port", "-P", metavar="N", help=f"Default: {_DEFAULTS.port}.")
    ] = None,
    api_key: Annotated[
        str | None,
        _option(_NETWORK, metavar="KEY", envvar="ISOLOGIT_API_KEY", help="Clients must send it as a bearer token."),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        _option(
            _NETWORK,
            metavar="ORIGIN",
            help="Pages of this origin may call from a browser; may be repeated, * is all, a JSON list works too.",
        ),
    ] = None,
    max_queue: Annotated[
        int, _option(_LIMITS, metavar="N", help="Requests that may wait; more are answered with 429.")
    ] = _DEFAULTS.max_queue,
    max_model_len: Annotated[
        int | None, _option(_LIMITS, metavar="N", help="Prompt and answer of a request. Default: the model's context.")
    ] = None,
    max_body_bytes: Annotated[
        int, _option(_LIMITS, metavar="N", help="Larger bodies are answered with 413.")
    ] = _DEFAULTS.max_body_bytes,
    request_timeout: Annotated[
        float | None, _option(_LIMITS, metavar="S", help="Longest time for an answer. Default: none.")
    ] = None,
    max_num_seqs: Annotated[int | None, _option(_ENGINE, metavar="N", help="Requests running at once [128].")] = None,
    max_num_batched_tokens: Annotated[int | None, _option(_ENGINE, metavar="N", help="Tokens of a step [512].")] = None,
    enable_prefix_caching: Annotated[
        bool, _option(_ENGINE, show_default=False, help="Compute a beginning that prompts share only once (on).")
    ] = _ENGINE_DEFAULTS.enable_prefix_caching,
    speculative_tokens: Annotated[
        int, _option(_ENGINE, metavar="N", help="Most draft tokens, found by prompt lookup; 0: no speculation.")
    ] = _ENGINE_DEFAULTS.num_speculative_tokens,
    draft_model: Annotated[
        str | None, _option(_ENGINE, metavar="DIR|FILE|PRESET", help="A smaller model that drafts instead.")
    ] = None,
    backend: BackendName = _ENGINE_DEFAULTS.backend,
    numerics: NumericsName = _ENGINE_DEFAULTS.numerics,
    device: DeviceName = _ENGINE_DEFAULTS.device,
    threads: Annotated[int | None, _option(_ENGINE, metavar="N", help="Worker threads. Default: every core.")] = None,
    plain_user_content: Annotated[
        bool,
        _option(
            _ENGINE,
            "--plain-user-content",
            help="Encode text of a conversation as plain text: </s> in a message ends nothing.",
        ),
    ] = _DEFAULTS.plain_user_content,
    weight_cache: Annotated[
        bool, _option(_ENGINE, show_default=False, help="Keep packed weights of large models on disk (on).")
    ] = _ENGINE_DEFAULTS.weight_cache,
    commit: Annotated[
        bool, _option(_ENGINE, "--commit", help="Commit to every streamed token, for isologit judge.")
    ] = _DEFAULTS.commit,
    strict_contest: Annotated[
        bool,
        _option(_ENGINE, "--strict-contest", help="Copy the quirks of the contest's server that clients can see."),
    ] = False,
) -> None:
    """Put a model behind HTTP: the contest's llm-serving API, OpenAI's and TGI's.

    Exit code 0: stopped after answering everything it took, 1: the engine could not go on, 2: something must be
    changed first.
    """
    with reporting_errors():
        from isologit.cli.display import display
        from isologit.server.contest_config import ContestConfig, load_contest_config
        from isologit.server.run import serve

        asked = ContestConfig() if config is None else load_contest_config(config)
        for line in asked.ignored:
            print(f"{config}: {line}", file=sys.stderr)
        if config is not None and model is None and asked.model is None:
            raise ConfigError(f"{config}: names no model; add model_config.model_cfg_path, or give --model")
        code = serve(
            ServerOptions(
                engine=EngineOptions(
                    model=model or (None if asked.model is None else str(asked.model)),
                    model_config=asked.model_config if model is None else None,
                    tokenizer=tokenizer or asked.tokenizer,
                    load_format=load_format,
                    qkv_layout=qkv_layout,
                    max_num_seqs=asked.max_num_seqs if max_num_seqs is None else max_num_seqs,
                    max_num_batched_tokens=max_num_batched_tokens,
                    enable_prefix_caching=enable_prefix_caching,
                    speculative_config=speculation(speculative_tokens, draft_model),
                    backend=backend,
                    numerics=numerics,
                    device=device,
                    num_threads=threads,
                    weight_cache=weight_cache,
                ),
                served_model_name=served_model_name or asked.name,
                host=host or asked.host or _DEFAULTS.host,
                port=next(p for p in (port, asked.port, _DEFAULTS.port) if p is not None),
                api_key=api_key,
                allowed_origins=_origins(allowed_origins or []),
                plain_user_content=plain_user_content,
                max_model_len=asked.max_model_len if max_model_len is None else max_model_len,
                max_queue=max_queue,
                max_body_bytes=max_body_bytes,
                request_timeout_s=request_timeout,
                strict_contest=strict_contest,
                commit=commit,
            ),
            starting=lambda: display(quiet=False),
        )
    raise typer.Exit(code)


def _origins(given: list[str]) -> tuple[str, ...]:
    """One origin for each option; vLLM's form, a JSON list, is read as well."""
    found: list[str] = []
    for text in given:
        try:
            values = json.loads(text) if text.startswith("[") else [text]
        except ValueError:
            values = [text]
        found += map(str, values)
    return tuple(found)
