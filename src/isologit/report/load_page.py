"""`report.html` of a folder of load results: one run, or one server at several rates.

Owns which figures and tables the page has and in which order. How they look is for the template and `load_figures`,
which keys the files have is for `load_results`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from isologit.common.files import write_text
from isologit.errors import OutputFolderError
from isologit.report import figures, load_figures, text
from isologit.report.load_results import LoadResult, Requests, read_load_results
from isologit.report.page import KeyFigure, Plot, Table, template
from isologit.report.svg import Floats

_PHASES = ("held back", "waiting for its first token", "being answered")
_MAX_SECTIONS = 12
_SHARED_FACTS = ("environment", "options")
_COLUMNS = (
    ("requests/s", "request_throughput"),
    ("tokens/s", "output_throughput"),
    ("TTFT mean", "mean_ttft_ms"),
    ("TTFT p99", "p99_ttft_ms"),
    ("TPOT mean", "mean_tpot_ms"),
    ("E2EL mean", "mean_e2el_ms"),
    ("E2EL p99", "p99_e2el_ms"),
)
_MEANING = {
    "VALID": "Every request was answered, and the load generator kept its schedule.",
    "INVALID": "Not every request was answered; runs that do not count are grey, with the reason.",
    "NOT CERTIFIED": "The load generator was late itself, so the figures may be off by more than 1 %.",
    "NOT CHECKED": "The result files do not say whether they count.",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A run in the table; one that does not count is grey."""

    cells: Sequence[str]
    reasons: Sequence[str]
    counts: bool


@dataclass(frozen=True, slots=True)
class Section:
    """The plots of one run."""

    title: str
    plots: Sequence[Plot]


def render_load_report(folder: Path) -> Path:
    """Write `folder/report.html` from the load results in `folder` and return its path.

    Raises OutputFolderError when there are none.
    """
    results = read_load_results(folder)
    if not results:
        raise OutputFolderError(f"{folder} holds no load result; save some with --save-detailed")
    verdict = _worst(results)
    page = template("load.html.j2").render(
        verdict=verdict,
        meaning=_MEANING.get(verdict, ""),
        subtitle=_subtitle(results),
        key_figures=_key_figures(results),
        runs=_runs(results),
        plots=_plots(results),
        sections=_sections(results),
        facts=_facts(results),
    )
    path = folder / "report.html"
    write_text(path, [page])
    return path


def _worst(results: Sequence[LoadResult]) -> str:
    found = {result.verdict for result in results}
    return next((word for word in ("INVALID", "NOT CERTIFIED", "NOT CHECKED") if word in found), "VALID")


def _subtitle(results: Sequence[LoadResult]) -> str:
    first = results[0].data
    parts = (
        first.get("backend"),
        first.get("url"),
        first.get("model_id"),
        first.get("started_at") or first.get("date"),
    )
    return " · ".join(str(part) for part in parts if part)


def _key_figures(results: Sequence[LoadResult]) -> list[KeyFigure]:
    """Of the one run, or of the one with most answers a second among those that count, or at least were answered."""
    candidates = [result for result in results if _counts(result)]
    candidates = candidates or [result for result in results if result.verdict != "INVALID"]
    if not candidates:
        return []
    best = max(candidates, key=lambda result: result.figure("request_throughput") or 0.0)
    where = "" if len(results) == 1 else f"best of {len(results)} rates: {best.label}"
    shown = [
        KeyFigure("Requests per second", text.number(best.figure("request_throughput")), where),
        KeyFigure("Total time", text.seconds(best.figure("duration")), "first request due to last answer complete"),
    ]
    if (tokens := best.figure("output_throughput")) is not None:
        shown.append(KeyFigure("Tokens per second", text.number(tokens), "output tokens"))
    for label, key in (("First token, p99", "p99_ttft_ms"), ("Whole answer, p99", "p99_e2el_ms")):
        if (value := best.figure(key)) is not None:
            shown.append(KeyFigure(label, text.seconds(value / 1000), "from the moment it was due"))
    return shown


def _runs(results: Sequence[LoadResult]) -> dict[str, Any]:
    columns = ["offered", "answered", "seconds", *(title for title, _ in _COLUMNS), "own lag", "verdict"]
    return {"columns": columns, "rows": [_row(result) for result in results]}


def _row(result: LoadResult) -> Row:
    data = result.data
    issued = data.get("issued", data.get("num_prompts"))
    lag = data.get("lag") or {}
    cells = [
        result.label,
        f"{data['completed']:,} of {text.value(issued)}",
        text.number(result.figure("duration")),
        *(text.number(result.figure(key)) for _, key in _COLUMNS),
        text.number(lag.get("mean_ms")),
        result.verdict,
    ]
    return Row(cells, [str(reason.get("message", reason)) for reason in data.get("reasons") or ()], _counts(result))


def _counts(result: LoadResult) -> bool:
    return result.verdict in ("VALID", "NOT CHECKED")


def _plots(results: Sequence[LoadResult]) -> list[Plot]:
    plots = _sweep_plots(results) if len({result.rate for result in results}) > 1 else []
    detailed = [(result, result.requests) for result in results if result.requests is not None]
    if detailed:
        panels = {
            "time to first token": [1e3 * (r.first_token_s - r.scheduled_s) for _, r in detailed],
            "time per output token": [1e3 * r.tpot_s for _, r in detailed],
            "whole answer": [1e3 * (r.finished_s - r.scheduled_s) for _, r in detailed],
        }
        drawn = {title: values for title, values in panels.items() if any(len(one) for one in values)}
        svg = load_figures.distributions(drawn, [result.label for result, _ in detailed])
        caption = "The share of answered requests that took at most so long, counted from the moment each was due."
        plots.append(Plot("cdf", "How long requests took", caption, Markup(svg)))
    return plots


def _sweep_plots(results: Sequence[LoadResult]) -> list[Plot]:
    rates = np.array([result.rate for result in results])
    valid = np.array([_counts(result) for result in results])
    requests, tokens = _column(results, "request_throughput"), _column(results, "output_throughput")
    svg = load_figures.throughput_against_rate(rates, requests, tokens, valid)
    caption = "Below the dotted line less is answered than offered, or the run was short. Hollow points do not count."
    plots = [Plot("throughput", "Throughput against rate", caption, Markup(svg))]
    panels = {
        title: _statistics(results, metric)
        for title, metric in (
            ("time to first token", "ttft"),
            ("time per output token", "tpot"),
            ("whole answer", "e2el"),
        )
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    if panels:
        svg = load_figures.latency_against_rate(rates, panels, valid)
        caption = "Counted from the moment a request was due, whether or not it could be sent."
        plots.append(Plot("latency", "Latency against rate", caption, Markup(svg)))
    if lines := _statistics(results, "e2el"):
        labels = [result.label for result in results]
        svg = load_figures.latency_against_throughput(requests, lines, labels, valid)
        caption = "Whole answers. Where the line turns upwards, more load only makes requests wait."
        plots.append(Plot("knee", "Latency against throughput", caption, Markup(svg)))
    return plots


def _statistics(results: Sequence[LoadResult], metric: str) -> dict[str, Floats]:
    """Lines of a metric that at least one run has."""
    lines = {
        label: _column(results, f"{key}_{metric}_ms")
        for label, key in (("mean", "mean"), ("median", "median"), ("p99", "p99"))
    }
    return {label: values for label, values in lines.items() if np.isfinite(values).any()}


def _column(results: Sequence[LoadResult], key: str) -> Floats:
    values = [result.figure(key) for result in results]
    return np.array([np.nan if value is None else value for value in values])


def _sections(results: Sequence[LoadResult]) -> list[Section]:
    detailed = [(result, result.requests) for result in results if result.requests is not None]
    return [
        Section(f"Request by request, {result.label}", _request_plots(requests, str(index)))
        for index, (result, requests) in enumerate(detailed[:_MAX_SECTIONS])
    ]


def _request_plots(requests: Requests, suffix: str) -> list[Plot]:
    name = f"timeline-{suffix}"
    svg = figures.request_timeline(
        requests.ids,
        requests.scheduled_s,
        requests.sent_s,
        requests.first_token_s,
        requests.finished_s,
        name=name,
        phases=_PHASES,
    )
    caption = "One row per answered request, from the moment it was due to the end of its answer."
    plots = [Plot(name, "Where each request was", caption, Markup(svg))]
    name = f"concurrency-{suffix}"
    svg = load_figures.concurrency_over_time(requests.sent_s, requests.finished_s, name=name)
    caption = "Requests that had been sent and were not yet answered."
    plots.append(Plot(name, "How many at once", caption, Markup(svg)))
    if len(requests.due_s) > 2 and requests.due_s[-1] > 0:
        name = f"gaps-{suffix}"
        svg = load_figures.gap_histogram(requests.due_s, name=name)
        caption = "What the load was: the gaps between the moments at which requests were due."
        plots.append(Plot(name, "Gaps between arrivals", caption, Markup(svg)))
    return plots


def _facts(results: Sequence[LoadResult]) -> list[Table]:
    """Options and environment that all runs have in common."""
    tables = []
    for key in _SHARED_FACTS:
        first, *others = [found if isinstance(found := result.data.get(key), Mapping) else {} for result in results]
        common = {name: value for name, value in first.items() if all(one.get(name) == value for one in others)}
        if rows := text.flatten(common):
            tables.append(Table(text.label(key).capitalize(), rows))
    files = [(result.name, str(_hash(result))) for result in results]
    return [*tables, Table("Files, with the hash of all answers", files)]


def _hash(result: LoadResult) -> str:
    hashes = result.data.get("hashes")
    return str(hashes.get("texts", "–")) if isinstance(hashes, Mapping) else "–"
