"""All commands of `isologit`. Heavy modules are loaded by the command that needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isologit import __version__
from isologit.cli.bench_command import bench_app
from isologit.cli.cache_command import cache_app
from isologit.cli.exits import Exit, reporting_errors
from isologit.cli.judge_command import judge_app
from isologit.cli.run_command import run_command
from isologit.cli.serve_command import serve_command

_ATOL = 5e-3
_CONTEST_RTOL = 1e-5

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run_command)
app.command("serve")(serve_command)
app.add_typer(bench_app, name="bench")
app.add_typer(cache_app, name="cache")
app.add_typer(judge_app, name="judge")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"isologit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run a set of prompts through a LLaMA model in the least total time, and prove that the logits did not change."""


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run's folder, a folder of .npy files, or a captures file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What to compare it with.")],
    atol: Annotated[float, typer.Option(help="Absolute difference that is allowed.")] = _ATOL,
    rtol: Annotated[float, typer.Option(help="Difference allowed in proportion to the value in B.")] = 0.0,
    contest_rtol: Annotated[
        bool, typer.Option("--contest-rtol", help="Use the contest's relative tolerance, 1e-5.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Compare the logits saved in two places. Exit code 0: they pass, 1: they do not, 2: they cannot be compared."""
    with reporting_errors(as_json=as_json):
        from isologit.errors import ConfigError
        from isologit.fidelity import compare_folders
        from isologit.job.folder import LOGITS

        if atol < 0 or rtol < 0:
            raise ConfigError(f"tolerances must not be negative; got atol {atol:g} and rtol {rtol:g}")
        if contest_rtol and rtol:
            raise ConfigError("--rtol and --contest-rtol exclude each other; give one")
        sides = [path / LOGITS if (path / LOGITS).is_dir() else path for path in (a, b)]
        found = compare_folders(*sides, atol=atol, rtol=_CONTEST_RTOL if contest_rtol else rtol)
        print(json.dumps(found.to_dict()) if as_json else "\n".join(found.summary_lines()))
        passed = found.verdict.valid
    raise typer.Exit(Exit.OK if passed else Exit.INVALID)


@app.command()
def certify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The output folder of a finished run.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR|FILE|PRESET", help="The run's model, if it is not where it was."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="Budget of re-scoring. Default: the run's time, at least a minute."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check a finished run against its model again, from its files alone. Exit code 0: VALID, 1: INVALID."""
    with reporting_errors(as_json=as_json):
        from isologit.cli.display import display
        from isologit.job.recertify import recertify

        with display(quiet=as_json) as observer:
            found = recertify(folder, model=model, seconds=seconds, observer=observer)
        if as_json:
            print(json.dumps(found.to_dict()))
        else:
            print("\n".join([found.statement(), *map(str, found.reasons)]))
        valid = found.verdict.valid
    raise typer.Exit(Exit.OK if valid else Exit.INVALID)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The output folder of a run, or of load results.")],
) -> None:
    """Write report.html from the files of a run or of load measurements."""
    with reporting_errors():
        from isologit.report import render_report

        print(render_report(folder))


def main() -> None:
    """The entry point `isologit`."""
    app()
