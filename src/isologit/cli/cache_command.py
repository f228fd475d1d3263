"""`isologit cache`: what is kept on disk of models' weights, and how to be rid of it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from isologit.cli.exits import reporting_errors

cache_app = typer.Typer(invoke_without_command=True)


@cache_app.callback()
def show(context: typer.Context) -> None:
    """List the packed weights that are kept on disk: name, size, last use, model."""
    if context.invoked_subcommand is not None:
        return
    with reporting_errors():
        from isologit.checkpoints.weight_cache import WeightCache

        cache = WeightCache()
        kept = cache.list()
        if not kept:
            print(f"nothing is kept in {cache.folder}")
            return
        print(f"{'NAME':<26} {'GiB':>6}  {'LAST USE':<16}  MODEL")
        for one in kept:
            used = datetime.fromtimestamp(one.last_used_s).strftime("%Y-%m-%d %H:%M")
            print(f"{one.name:<26} {one.num_bytes / 2**30:>6.1f}  {used:<16}  {one.title}")
        print(f"{sum(one.num_bytes for one in kept) / 2**30:.1f} GiB in {cache.folder}")


@cache_app.command()
def clear(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="What to remove, by its name or model. Default: everything.")
    ] = None,
) -> None:
    """Remove kept weights; the next start reads the model's own files."""
    with reporting_errors():
        from isologit.checkpoints.weight_cache import WeightCache
        from isologit.errors import ConfigError

        gone = WeightCache().clear(name)
        if name is not None and not gone:
            raise ConfigError(f"nothing is kept of {name}; isologit cache lists what is")
        print(f"removed {', '.join(path.stem for path in gone)}" if gone else "nothing was kept")
