"""`report.html` from the files of a run's folder.

Owns which figures and tables the page has and in which order. How they look is for the template and `figures`, which
keys the files have is for `results`. It sees no live state: the page can be made again long after the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from isologit.common.files import write_text
from isologit.errors import OutputFolderError
from isologit.report import figures, text
from isologit.report.results import Outputs, Steps, dig, read_json, read_outputs, read_steps

DEFAULT_TOLERANCE = 5e-3
_MAX_FAILED = 50
_MAX_DIVERGENCES = 20


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One number of the page's head: what it is, its value, and what it was measured on."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under one heading; `columns` is empty for a table of names and values."""

    title: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure with its title and the sentence that says how to read it."""

    name: str
    title: str
    caption: str
    svg: Markup


def render_report(folder: Path) -> Path:
    """Write `folder/report.html` from the result files in `folder` and return its path.

    The page needs nothing beside itself. It is written whole or not at all. Raises OutputFolderError when there is no
    `result.json` or a file is damaged.
    """
    result = read_json(folder / "result.json")
    if not result:
        raise OutputFolderError(f"{folder} holds no result.json; give the output folder of a finished run")
    certificate = read_json(folder / "certificate.json")
    outputs = read_outputs(folder / "outputs.jsonl")
    steps = read_steps(folder / "steps.jsonl")
    page = template("report.html.j2").render(
        verdict=str(certificate.get("verdict") or "NOT CHECKED"),
        reasons=[_sentence(reason) for reason in certificate.get("reasons") or ()],
        mode=_mode(result),
        subtitle=_subtitle(result),
        key_figures=_key_figures(result, certificate),
        speed_plots=_speed_plots(outputs, steps),
        fidelity_plots=_fidelity_plots(certificate),
        certificate=_certificate_table(certificate),
        divergences=_divergence_table(certificate),
        num_failed=len(outputs.failed),
        failed=outputs.failed[:_MAX_FAILED],
        samples=outputs.samples,
        facts=_fact_tables(result),
    )
    path = folder / "report.html"
    write_text(path, [page])
    return path


def _sentence(reason: Any) -> str:
    """Of a reason with code and message, or of one sentence, as older files have them."""
    return "{code}: {message}".format(**reason) if isinstance(reason, dict) else str(reason)


def _mode(result: Mapping[str, Any]) -> str:
    return "replay: output tokens were forced from a record" if dig(result, "mode") == "replay" else ""


def _subtitle(result: Mapping[str, Any]) -> str:
    parts = (dig(result, "model.name"), dig(result, "dataset.name"), dig(result, "started_at"))
    return " · ".join(str(part) for part in parts if part)


def _key_figures(result: Mapping[str, Any], certificate: Mapping[str, Any]) -> list[KeyFigure]:
    shown: list[KeyFigure] = []
    seconds, tokens = dig(result, "totals.inference_s"), dig(result, "totals.output_tokens")
    if seconds is not None:
        shown.append(KeyFigure("Inference", text.seconds(seconds), "first request in to last answer complete"))
    if seconds and tokens is not None:
        shown.append(KeyFigure("Tokens per second", text.number(tokens / seconds), f"{tokens:,} output tokens"))
    completed, failed = dig(result, "totals.completed"), dig(result, "totals.failed") or 0
    if completed is not None:
        shown.append(KeyFigure("Requests", f"{completed:,}", f"completed · {failed:,} failed"))
    baseline = dig(result, "baseline")
    if isinstance(baseline, Mapping) and baseline.get("speedup") is not None:
        count = baseline.get("requests")
        same = "request" if count == 1 else f"{text.value(count)} requests"
        note = (
            f"over the baseline: {text.seconds(baseline.get('seconds'))} → {text.seconds(baseline.get('engine_s'))} "
            f"on the same {same}"
        )
        shown.append(KeyFigure("Speed-up", f"{baseline['speedup']:.1f}×", note))
    worst = dig(certificate, "captured.max_abs")
    if worst is not None:
        shown.append(
            KeyFigure("Largest |Δlogit|", text.number(worst), f"allowed {text.number(_tolerance(certificate))}")
        )
    return shown


def _tolerance(certificate: Mapping[str, Any]) -> float:
    return float(dig(certificate, "tolerance.atol") or DEFAULT_TOLERANCE)


def _speed_plots(outputs: Outputs, steps: Steps | None) -> list[Plot]:
    plots = []
    if outputs.timeline is not None:
        t = outputs.timeline
        svg = figures.request_timeline(t.ids, t.arrival_s, t.scheduled_s, t.first_token_s, t.finished_s)
        caption = "One row per request: waiting for a slot, computing its prompt, then writing its output."
        plots.append(Plot("timeline", "Where each request was", caption, Markup(svg)))
    if steps is not None:
        svg = figures.batch_over_time(steps.start_s, steps.end_s, steps.num_seqs, steps.num_tokens)
        caption = (
            f"{len(steps.end_s):,} steps. A step takes one token of every running sequence, and more where a prompt "
            "or a draft is computed."
        )
        plots.append(Plot("batch", "How full the steps were", caption, Markup(svg)))
    return plots


def _fidelity_plots(certificate: Mapping[str, Any]) -> list[Plot]:
    plots = []
    tolerance = _tolerance(certificate)
    edges, counts = dig(certificate, "captured.histogram.edges"), dig(certificate, "captured.histogram.counts")
    if edges and counts:
        floor = dig(certificate, "noise_floor.max_abs")
        svg = figures.delta_histogram(
            np.array(edges, float), np.array(counts, float), tolerance=tolerance, noise_floor=floor
        )
        caption = (
            f"{text.number(int(sum(counts)))} logits captured during the timed run, against the reference. "
            "The first bar also holds all smaller ones. The noise floor is the reference against itself, computed "
            "another way."
        )
        plots.append(Plot("histogram", "How far the logits are from the reference", caption, Markup(svg)))
    pairs = dig(certificate, "captured.scatter")
    if pairs:
        logit, delta = np.abs(np.array(pairs, float)).T
        svg = figures.delta_against_logit(logit, delta, tolerance=tolerance)
        caption = "A sample of the captured logits. Rounding to fp16 alone would put differences up to the orange line."
        plots.append(Plot("scatter", "Difference against size", caption, Markup(svg)))
    return plots


def _certificate_table(certificate: Mapping[str, Any]) -> Table | None:
    figures_only = {k: v for k, v in certificate.items() if k not in {"verdict", "reasons"}}
    rows = [row for row in text.flatten(figures_only) if "histogram" not in row[0]]
    return Table("Certificate", rows) if rows else None


def _divergence_table(certificate: Mapping[str, Any]) -> Table | None:
    found = dig(certificate, "greedy.divergences")
    if not found:
        return None
    columns = list(found[0])
    rows = [[text.value(entry.get(key)) for key in columns] for entry in found[:_MAX_DIVERGENCES]]
    note = f"first {len(rows)} of {len(found)}" if len(found) > len(rows) else ""
    return Table("First divergences and ties", rows, [text.label(c) for c in columns], note)


def _fact_tables(result: Mapping[str, Any]) -> list[Table]:
    """Everything else `result.json` says, a table for each of its parts."""
    tables = []
    loose = {key: item for key, item in result.items() if not isinstance(item, Mapping)}
    if loose:
        tables.append(Table("Run", text.flatten(loose)))
    for key, item in result.items():
        if isinstance(item, Mapping) and (rows := text.flatten(item)):
            tables.append(Table(text.label(key).capitalize(), rows))
    return tables


def template(name: str) -> Template:
    """A page's template; whatever is put into it is escaped."""
    environment = Environment(
        loader=PackageLoader("isologit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
