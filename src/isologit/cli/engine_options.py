"""Options of the engine that several commands have in common; their defaults are those of `EngineOptions`."""

from __future__ import annotations

from typing import Annotated

import typer

ENGINE_PANEL = "How it runs"

BackendName = Annotated[
    str,
    typer.Option(
        rich_help_panel=ENGINE_PANEL,
        metavar="NAME",
        help="What computes: cpu, torch, ...; auto takes the best there is.",
    ),
]
NumericsName = Annotated[
    str,
    typer.Option(
        rich_help_panel=ENGINE_PANEL,
        metavar="NAME",
        help="What the backend keeps of float32 values: one of its schemes; auto takes its default.",
    ),
]
DeviceName = Annotated[
    str,
    typer.Option(rich_help_panel=ENGINE_PANEL, help="Where: cpu, cuda, cuda:1, ...; auto leaves it to the backend."),
]
