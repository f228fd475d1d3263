"""`isologit judge`: rounds, the board, packs. Heavy modules are loaded by the command that needs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from isologit.cli.exits import Exit, interrupt_on_sigterm, reporting_errors

judge_app = typer.Typer(no_args_is_help=True, help="Judge entries by time, and let no known cheat through.")

_DEFAULT_FOLDER = Path("judge")
_Folder = Annotated[Path, typer.Option("--folder", metavar="DIR", help="The judge's folder.")]
_Round = Annotated[str | None, typer.Option("--round", metavar="ID", help="Default: the newest round.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@judge_app.command("run")
def run(
    entries: Annotated[
        list[Path] | None,
        typer.Argument(metavar="ENTRY...", help="Folders that hold an entry.yaml. Default: the bundled examples."),
    ] = None,
    profile: Annotated[
        str, typer.Option(metavar="NAME|YAML", help="smoke, offline, contest-phase1, contest-phase2, or a file.")
    ] = "smoke",
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Weights. Default: the profile's.")] = None,
    anchor: Annotated[
        str | None, typer.Option(metavar="NAME", help="The entry that times are compared with. Default: the first.")
    ] = None,
    practice: Annotated[
        bool, typer.Option("--practice", help="Without a sandbox; the result says NOT RANKED.")
    ] = False,
    folder: _Folder = _DEFAULT_FOLDER,
) -> None:
    """Judge entries in a new round. Exit code 0: all are VALID, 1: one is not."""
    with reporting_errors():
        interrupt_on_sigterm()
        from isologit.judge.entry import Entry
        from isologit.judge.examples import example_entries
        from isologit.judge.profile import load_profile
        from isologit.judge.round import Judge

        listed = [Entry(path) for path in entries] if entries else example_entries()
        judge = Judge(folder, _say)
        round_id = judge.begin(listed, load_profile(profile), model=model, anchor=anchor, practice=practice)
        print(f"round {round_id} in {folder}; after an interruption go on with: isologit judge resume", file=sys.stderr)
        judge.run(round_id)
        invalid = _finish(folder, round_id)
    raise typer.Exit(Exit.INVALID if invalid else Exit.OK)


@judge_app.command("resume")
def resume(round_id: _Round = None, folder: _Folder = _DEFAULT_FOLDER) -> None:
    """Go on with a round that was interrupted."""
    with reporting_errors():
        interrupt_on_sigterm()
        from isologit.judge.board import read_board
        from isologit.judge.database import Database
        from isologit.judge.round import Judge

        chosen = read_board(Database(folder), round_id).round_id
        Judge(folder, _say).run(chosen)
        invalid = _finish(folder, chosen)
    raise typer.Exit(Exit.INVALID if invalid else Exit.OK)


@judge_app.command("again")
def again(round_id: _Round = None, folder: _Folder = _DEFAULT_FOLDER) -> None:
    """Judge a round again by the audits of today, and list what changes; runs are made only where evidence lacks."""
    with reporting_errors():
        interrupt_on_sigterm()
        from isologit.judge.board import changes, read_board
        from isologit.judge.database import Database
        from isologit.judge.round import Judge

        before = read_board(Database(folder), round_id)
        Judge(folder, _say).again(before.round_id)
        found = changes(before, read_board(Database(folder), before.round_id))
        _finish(folder, before.round_id)
        for line in found or ("no verdict and no rank has changed",):
            print(_plain(line))


@judge_app.command("board")
def board(round_id: _Round = None, folder: _Folder = _DEFAULT_FOLDER, as_json: _Json = False) -> None:
    """Show the ranking of a round."""
    with reporting_errors(as_json=as_json):
        from isologit.judge.board import read_board
        from isologit.judge.database import Database

        found = read_board(Database(folder), round_id)
        if as_json:
            print(json.dumps(found.to_dict()))
        else:
            from isologit.cli.judge_summary import show_board

            show_board(found)


@judge_app.command("rounds")
def rounds(folder: _Folder = _DEFAULT_FOLDER) -> None:
    """List the rounds in a judge's folder."""
    with reporting_errors():
        from isologit.judge.board import read_rounds
        from isologit.judge.database import Database

        for name, profile, state, created_at in read_rounds(Database(folder)):
            print(f"{name}  {profile:<16} {state:<9} {created_at}")


@judge_app.command("web")
def web(
    folder: _Folder = _DEFAULT_FOLDER,
    host: Annotated[str, typer.Option(metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-P", metavar="N")] = 8840,
) -> None:
    """Serve the board and the reports, live while a round runs."""
    with reporting_errors():
        from isologit.judge.database import Database
        from isologit.judge.web import serve

        serve(Database(folder), host, port, lambda line: print(line, file=sys.stderr, flush=True))


@judge_app.command("pack")
def pack(
    target: Annotated[Path, typer.Argument(metavar="FILE.zip")],
    round_id: _Round = None,
    folder: _Folder = _DEFAULT_FOLDER,
) -> None:
    """Zip a finished round with entries, evidence, logs, seed and hashes."""
    with reporting_errors():
        from isologit.judge.board import read_board
        from isologit.judge.database import Database
        from isologit.judge.pack import write_pack

        database = Database(folder)
        print(write_pack(database, read_board(database, round_id).round_id, target))


@judge_app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE.zip")],
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Weights. Default: the profile's.")] = None,
) -> None:
    """Judge a pack offline: hashes, seed, draws, verdicts, times and ranks. Exit code 1: something does not agree."""
    with reporting_errors():
        from isologit.judge.verify import verify_pack

        found = verify_pack(file, model=model)
        for name, verdict in found.verdicts.items():
            place = f"rank {found.ranks[name]}" if name in found.ranks else ""
            print(f"{verdict.status:<8} {place:<7} {_plain(name)}")
        for problem in found.problems:
            print(f"does not agree: {_plain(problem)}")
        if not found.problems:
            print("everything follows from the seed and the evidence")
    raise typer.Exit(Exit.INVALID if found.problems else Exit.OK)


@judge_app.command("score")
def score(
    entry: Annotated[str, typer.Argument(metavar="NAME", help="The entry's name.")],
    points: Annotated[list[str], typer.Argument(metavar="WHAT=POINTS...", help="For example innovation=35.")],
    round_id: _Round = None,
    folder: _Folder = _DEFAULT_FOLDER,
) -> None:
    """Record a panel's points for an entry, in a profile that has a panel."""
    with reporting_errors():
        from isologit.judge.database import Database
        from isologit.judge.panel import record_points

        record_points(Database(folder), round_id, entry, points)


def _say(progress: object) -> None:
    from isologit.judge.round import Progress

    assert isinstance(progress, Progress)
    print(f"[{progress.done}/{progress.total}] {_plain(progress.doing)}", file=sys.stderr, flush=True)


def _finish(folder: Path, round_id: str) -> bool:
    """Write the reports and show the board; whether an entry is INVALID."""
    from isologit.cli.judge_summary import show_board
    from isologit.judge.board import read_board
    from isologit.judge.database import Database
    from isologit.judge.reports import write_reports

    database = Database(folder)
    where = write_reports(database, round_id)
    found = read_board(database, round_id)
    show_board(found)
    print(f"reports: {where}")
    return any(row.status == "INVALID" for row in found.rows)


def _plain(text: str) -> str:
    """Without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)
