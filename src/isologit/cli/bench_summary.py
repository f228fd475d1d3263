"""The short tables at the end of a measurement."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from isologit.bench.contest import contest_line
from isologit.bench.serving import Measurement

_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "gap between tokens",
    "e2el": "whole answer",
}


def print_measurement(measurement: Measurement) -> None:
    """Print a load run's figures, the contest's line and the verdict to standard output."""
    found = measurement.result
    console = Console()
    table = Table(title=f"{found['backend']} · {found['url']}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(name, value)
    console.print(table)
    if spread := _spread(found):
        console.print(spread)
    print(contest_line(measurement.run))
    console.print(found["verdict"], style="bold green" if found["verdict"] == "VALID" else "bold red")
    for reason in found["reasons"]:
        console.print(f"{reason['code']}: {reason['message']}", markup=False, highlight=False, soft_wrap=True)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    tokens = f"{_count(found['total_input_tokens'])} in, {_count(found['total_output_tokens'])} out"
    if found["output_tokens_counted_by"] is not None:
        tokens += f", counted by {found['output_tokens_counted_by']}"
    elif found["completed"]:
        tokens += "; the server counts none, so name a tokenizer with --tokenizer"
    rows = [
        ("requests", f"{found['completed']} of {found['issued']} completed, sent {_rate(found['request_rate'])}"),
        ("duration", f"{found['duration']:.2f} s"),
        ("tokens", tokens),
        (
            "throughput",
            f"{_number(found['request_throughput'])} requests/s, {_number(found['output_throughput'])} tokens/s",
        ),
        ("at once", f"{found['max_concurrent_requests']} requests"),
    ]
    if found["request_goodput"] is not None:
        rows.append(("goodput", f"{found['request_goodput']:.2f} requests/s"))
    if found["lag"] is not None:
        rows.append(("own lag", f"{found['lag']['mean_ms']:.2f} ms mean, {found['lag']['max_ms']:.2f} ms at most"))
    return rows


def _rate(value: float | str) -> str:
    return "all at once" if value == "inf" else f"at {value} a second"


def _spread(found: dict[str, Any]) -> Table | None:
    """Milliseconds of every metric that was asked for: mean, and its percentiles."""
    ends = [key.removesuffix("_ms").rpartition("_") for key in found if key.endswith("_ms")]
    columns = list(dict.fromkeys(start for start, _, _ in ends if start in ("mean",) or start.startswith("p")))
    metrics = list(dict.fromkeys(end for _, _, end in ends if end in _TITLES))
    if not metrics:
        return None
    table = Table(title="milliseconds", title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for metric in metrics:
        table.add_row(_TITLES[metric], *(_number(found.get(f"{column}_{metric}_ms")) for column in columns))
    return table


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.2f}"
