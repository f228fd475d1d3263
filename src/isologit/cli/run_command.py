"""`isologit run`: options in, exit code out."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from isologit.cli.engine_options import ENGINE_PANEL as _ENGINE
from isologit.cli.engine_options import BackendName, DeviceName, NumericsName
from isologit.cli.exits import Exit, interrupt_on_sigterm, leave, reporting_errors
from isologit.config import EngineOptions, speculation
from isologit.errors import ConfigError
from isologit.job.options import DEFAULT_BASELINE_REQUESTS, DEFAULT_BASELINE_SECONDS, DEFAULT_MAX_NEW_TOKENS, RunOptions
from isologit.workload.dataset import DatasetFormat

if TYPE_CHECKING:
    from isologit.job.result import RunResult

_ENGINE_DEFAULTS = EngineOptions()
_INPUT = "What to run"
_OUTPUT = "Where results go"
_PROOF = "What it is held against"


def run_command(
    model: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_INPUT,
            metavar="DIR|FILE|PRESET",
            help="Model folder or checkpoint file; with --load-format dummy a preset (llama2-7b, llama2-13b, "
            "tinyllama-1.1b, llama-110m) or a config.json. Default: the built-in demo model.",
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_INPUT,
            metavar="FILE",
            help="Prompts: Alpaca JSON, JSONL, or lines of text. Default: 1500 built-in prompts.",
        ),
    ] = None,
    dataset_format: Annotated[
        DatasetFormat, typer.Option(rich_help_panel=_INPUT, help="What the prompt file is; auto tells by its content.")
    ] = "auto",
    limit: Annotated[
        int | None, typer.Option(rich_help_panel=_INPUT, metavar="N", help="Run only the first N prompts.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(rich_help_panel=_INPUT, metavar="N", help="Longest answer where the dataset names none.")
    ] = DEFAULT_MAX_NEW_TOKENS,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", rich_help_panel=_INPUT, help="Let only the length end an answer.")
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_INPUT,
            metavar="FILE",
            help="Force the outputs recorded in this JSONL while computing everything. Its prompts are used "
            "when --dataset is not given.",
        ),
    ] = None,
    load_format: Annotated[
        Literal["auto", "dummy"],
        typer.Option(rich_help_panel=_INPUT, help="dummy: seeded random weights of the model's shape."),
    ] = _ENGINE_DEFAULTS.load_format,
    tokenizer: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_INPUT, metavar="DIR|FILE", help="Tokenizer, when the model's folder has none."),
    ] = None,
    qkv_layout: Annotated[
        Literal["concat", "interleaved"] | None,
        typer.Option(rich_help_panel=_INPUT, help="Layout of fused matrices in a MindFormers checkpoint."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_OUTPUT, metavar="DIR", help="Folder to write. Default: runs/ and the time."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", rich_help_panel=_OUTPUT, help="Go on with the interrupted run in --output; same options."
        ),
    ] = False,
    save_logits: Annotated[
        Literal["none", "captured", "contest"],
        typer.Option(rich_help_panel=_OUTPUT, help="captured: the rows that were checked. contest: its .npy files."),
    ] = "captured",
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="Print one JSON object and nothing else.")
    ] = False,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan-only", rich_help_panel=_OUTPUT, help="Only say what memory the run would take, stage by stage."
        ),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            rich_help_panel=_OUTPUT,
            help="Also show where the steps' time went, beside the machine's measured limits.",
        ),
    ] = False,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(rich_help_panel=_ENGINE, metavar="N", help="Requests running at once. Default: planned."),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(rich_help_panel=_ENGINE, metavar="N", help="Tokens of one step. Default: planned.")
    ] = None,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            rich_help_panel=_ENGINE, show_default=False, help="Compute a beginning that prompts share only once (on)."
        ),
    ] = _ENGINE_DEFAULTS.enable_prefix_caching,
    speculative_tokens: Annotated[
        int,
        typer.Option(
            rich_help_panel=_ENGINE, metavar="N", help="Most draft tokens, found by prompt lookup; 0: no speculation."
        ),
    ] = _ENGINE_DEFAULTS.num_speculative_tokens,
    draft_model: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_ENGINE,
            metavar="DIR|FILE|PRESET",
            help="A smaller model of the same vocabulary that drafts instead. Default: none.",
        ),
    ] = None,
    order: Annotated[
        Literal["longest-first", "given"],
        typer.Option(rich_help_panel=_ENGINE, help="Which requests start first."),
    ] = "longest-first" if _ENGINE_DEFAULTS.longest_first else "given",
    backend: BackendName = _ENGINE_DEFAULTS.backend,
    numerics: NumericsName = _ENGINE_DEFAULTS.numerics,
    device: DeviceName = _ENGINE_DEFAULTS.device,
    threads: Annotated[
        int | None, typer.Option(rich_help_panel=_ENGINE, metavar="N", help="Worker threads. Default: every core.")
    ] = None,
    weight_cache: Annotated[
        bool,
        typer.Option(
            rich_help_panel=_ENGINE,
            show_default=False,
            help="Keep packed weights of large models on disk for the next start (on).",
        ),
    ] = _ENGINE_DEFAULTS.weight_cache,
    seed: Annotated[
        int, typer.Option(rich_help_panel=_ENGINE, metavar="N", help="Of dummy weights and of the baseline's sample.")
    ] = _ENGINE_DEFAULTS.seed,
    baseline_requests: Annotated[
        str,
        typer.Option(
            rich_help_panel=_PROOF,
            metavar="N|all|0",
            help="Requests also timed one at a time with Hugging Face transformers; 0 leaves that out.",
        ),
    ] = str(DEFAULT_BASELINE_REQUESTS),
    baseline_seconds: Annotated[
        float,
        typer.Option(
            rich_help_panel=_PROOF, metavar="S", help="Time fewer of them if all are predicted to take longer."
        ),
    ] = DEFAULT_BASELINE_SECONDS,
    capture_rows: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_PROOF, metavar="N", help="Logits rows kept for the certificate. Default: 2 % of tokens."
        ),
    ] = None,
    capture_seed: Annotated[
        int | None,
        typer.Option(rich_help_panel=_PROOF, metavar="N", help="Seed of which rows. Default: secret until the end."),
    ] = None,
    certify_seconds: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_PROOF,
            metavar="S",
            help="Time for re-scoring outputs. Default: the run's own time, at least 60.",
        ),
    ] = None,
) -> None:
    """Run prompts through a model, time it, and prove the logits.

    Exit code 0: all is well, 1: the certificate says INVALID, 2: nothing ran because something must be changed first,
    3: some requests have no answer, 130: interrupted.
    """
    with reporting_errors(as_json=as_json):
        options = RunOptions(
            engine=EngineOptions(
                model=model,
                tokenizer=tokenizer,
                load_format=load_format,
                qkv_layout=qkv_layout,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                enable_prefix_caching=enable_prefix_caching,
                longest_first=order == "longest-first",
                speculative_config=speculation(speculative_tokens, draft_model),
                backend=backend,
                numerics=numerics,
                device=device,
                num_threads=threads,
                weight_cache=weight_cache,
                seed=seed,
            ),
            dataset=dataset,
            dataset_format=dataset_format,
            output=output,
            limit=limit,
            replay=replay,
            ignore_eos=ignore_eos,
            max_new_tokens=max_new_tokens,
            baseline_requests=_baseline_requests(baseline_requests),
            baseline_seconds=baseline_seconds,
            certify_seconds=certify_seconds,
            save_logits=save_logits,
            capture_rows=capture_rows,
            capture_seed=capture_seed,
            resume=resume,
            profile=profile,
        )
        code = (_show_memory_plan if plan_only else _run_and_show)(options, as_json=as_json)
    raise typer.Exit(code)


def _show_memory_plan(options: RunOptions, *, as_json: bool) -> Exit:
    """Print the memory of a run, whether it can be made or not."""
    from isologit.cli.summary import print_memory_plan
    from isologit.job.preview import plan_run

    plan = plan_run(options)
    if as_json:
        print(json.dumps(plan.to_dict()))
    else:
        print_memory_plan(plan)
    return Exit.OK


def _run_and_show(options: RunOptions, *, as_json: bool) -> Exit:
    result = _run(options, as_json=as_json)
    code = Exit.INVALID if not result.valid else Exit.SOME_FAILED if result.num_failed else Exit.OK
    if as_json:
        print(json.dumps({**result.data, "exit_code": int(code)}))
    else:
        from isologit.cli.summary import print_summary

        print_summary(result)
    return code


def _run(options: RunOptions, *, as_json: bool) -> RunResult:
    """Do the job and show it; an interruption says how to go on."""
    from isologit.cli.display import display
    from isologit.job.run import RunInterrupted, run_job

    interrupt_on_sigterm()
    try:
        with display(quiet=as_json) as observer:
            return run_job(options, observer=observer)
    except RunInterrupted as error:
        hint = f"; continue with: {_resume_command(error.folder)}" if error.resumable else ""
        leave(Exit.INTERRUPTED, f"{error}{hint}", as_json=as_json)


def _resume_command(folder: Path) -> str:
    arguments = sys.argv[1:]
    given = any(argument == "--output" or argument.startswith("--output=") for argument in arguments)
    extra = [] if given else ["--output", str(folder)]
    return shlex.join(["isologit", *arguments, *extra, *([] if "--resume" in arguments else ["--resume"])])


def _baseline_requests(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f'--baseline-requests is a number or "all", not "{text}"') from None
