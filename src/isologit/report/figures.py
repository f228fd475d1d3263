"""Inline SVG figures: arrays in, a string of markup out.

Owns how figures look and how the SVG of matplotlib is made fit for a page: text stays text, colours become CSS
variables (one figure serves the light and the dark page), ids are unique to their figure, coordinates are short, and
nothing in the markup names an address. It does not know files, verdicts or the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

# Stand-ins that matplotlib draws with, and the CSS variables they become. The page gives the variables their values.
_INK, _MUTED, _GRID, _PAPER = "#010101", "#010102", "#010103", "#010104"
_BLUE, _ORANGE, _GREEN, _RED = "#010105", "#010106", "#010107", "#010108"
_VARIABLES = {
    _INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _PAPER: "--card",
    _BLUE: "--blue", _ORANGE: "--orange", _GREEN: "--green", _RED: "--red",
}  # fmt: skip

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 10.5,
    "text.color": _INK,
    "axes.facecolor": "none",
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.borderaxespad": 0.0,
    "figure.facecolor": "none",
    "path.simplify": False,
}
_WIDTH_IN = 9.2
_MAX_BINS = 1200  # points along a time axis; more steps than this are drawn as range and mean of neighbours
_NAMED_ROWS = 32  # up to this many requests have their ids on the axis


def request_timeline(
    ids: Sequence[str], arrival_s: Floats, scheduled_s: Floats, first_token_s: Floats, finished_s: Floats
) -> str:
    """One row per request, in order of start: waiting, then prompt (prefill), then output (decode). Arrays are [n]."""
    order = np.lexsort((finished_s, scheduled_s))
    count = len(order)
    bounds = [series[order] for series in (arrival_s, scheduled_s, first_token_s, finished_s)]
    names = count <= _NAMED_ROWS
    height = 1.2 + 0.21 * count if names else 4.6
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "timeline"}):
        figure, axes = _figure(height)
        phases = (("queue", _GRID), ("prefill", _ORANGE), ("decode", _BLUE))
        for (label, color), start, end in zip(phases, bounds, bounds[1:], strict=False):
            if names:
                axes.barh(np.arange(count), end - start, left=start, height=0.72, color=color, label=label, linewidth=0)
            else:
                _fill_rows(axes, start, end, color, label)
        if names:
            axes.set_yticks(np.arange(count), [_short(ids[i]) for i in order])
            axes.grid(axis="y", visible=False)
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_xlim(0, _end(bounds[-1]))
        axes.set_ylabel("request" if names else "requests, in order of start")
        axes.set_xlabel("seconds since the run began")
        _legend(axes)
        return _markup(figure, "timeline")


def batch_over_time(start_s: Floats, end_s: Floats, num_seqs: Floats, num_tokens: Floats) -> str:
    """Sequences and tokens of each step against time; arrays are [steps]."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "batch"}):
        figure = Figure(figsize=(_WIDTH_IN, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, values, color, label in (
            (upper, num_seqs, _BLUE, "sequences in a step"),
            (lower, num_tokens, _ORANGE, "tokens in a step"),
        ):
            edges, low, mean, high = _bins(start_s, end_s, values)
            if np.any(high > low):
                axes.stairs(high, edges, baseline=low, fill=True, color=color, alpha=0.35, linewidth=0)
                axes.stairs(mean, edges, baseline=None, color=color, linewidth=1.2)
            else:
                axes.stairs(mean, edges, fill=True, color=color, alpha=0.22, linewidth=0)
                axes.stairs(mean, edges, baseline=None, color=color, linewidth=1.2)
            axes.set_ylim(0, max(1.0, float(high.max()) * 1.08))
            axes.set_xlim(0, _end(end_s))
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
            axes.set_title(label, loc="left", fontsize=10.5, color=color)
        lower.set_xlabel("seconds since the run began")
        return _markup(figure, "batch")


def delta_histogram(edges: Floats, counts: Floats, *, tolerance: float, noise_floor: float | None) -> str:
    """How many compared logits lie how far from the reference; `edges` [n + 1] ascend and may begin with 0."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "histogram"}):
        figure, axes = _figure(3.5)
        positive = edges[edges > 0]
        start = positive[0] / 10 if edges[0] <= 0 else positive[0]
        drawn = np.maximum(edges, start)
        over = edges[:-1] >= tolerance
        axes.stairs(np.where(over, 0, counts), drawn, fill=True, color=_BLUE, linewidth=0)
        axes.stairs(np.where(over, counts, 0), drawn, fill=True, color=_RED, linewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        occupied = np.flatnonzero(counts)
        left = drawn[occupied[0]] if len(occupied) else start
        right = max(tolerance * 20, drawn[occupied[-1] + 1] if len(occupied) else 0.0)
        axes.set_xlim(left / 1.3, right * 1.3)
        axes.set_ylim(0.7, max(10.0, float(counts.max()) * 6) if len(counts) else 10.0)
        _mark_x(axes, tolerance, f"tolerance {tolerance:g}", _RED, "left")
        if noise_floor:
            _mark_x(axes, noise_floor, f"noise floor {noise_floor:.1e}", _MUTED, "right")
        axes.set_xlabel("|Δlogit| against the reference")
        axes.set_ylabel("logits")
        axes.grid(axis="x", visible=False)
        return _markup(figure, "histogram")


def delta_against_logit(logit: Floats, delta: Floats, *, tolerance: float) -> str:
    """|Δlogit| of sampled entries against the |logit| of the reference, with half an fp16 step for scale."""
    keep = (delta > 0) & (logit > 0)
    logit, delta = logit[keep], delta[keep]
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "scatter"}):
        figure, axes = _figure(3.6)
        axes.plot(logit, delta, ".", color=_BLUE, markersize=3.2, alpha=0.55, markeredgewidth=0)
        grid = np.linspace(0, float(logit.max()) if len(logit) else 10.0, 800)[1:]
        axes.plot(grid, _half_fp16_step(grid), color=_ORANGE, linewidth=1.4)
        axes.annotate(
            "half an fp16 step", (grid[400], _half_fp16_step(grid)[400]),
            textcoords="offset points", xytext=(0, -6), va="top", color=_ORANGE,
        )  # fmt: skip
        axes.axhline(tolerance, color=_RED, linewidth=1.4)
        axes.annotate(
            f"tolerance {tolerance:g}", (0, tolerance),
            textcoords="offset points", xytext=(4, 4), color=_RED,
        )  # fmt: skip
        axes.set_xlim(0, None)
        axes.set_yscale("log")
        axes.set_xlabel("|logit| of the reference")
        axes.set_ylabel("|Δlogit|")
        return _markup(figure, "scatter")


def _half_fp16_step(values: Floats) -> Floats:
    return np.spacing(np.minimum(values, 6e4).astype(np.float16)).astype(np.float64) / 2


def _figure(height_in: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots()


def _fill_rows(axes: Any, start: Floats, end: Floats, color: str, label: str) -> None:
    """All bars of a phase as one outline: 1500 separate bars would be most of the page's bytes."""
    rows = np.repeat(np.arange(len(start) + 1), 2)[1:-1] - 0.5
    axes.fill_betweenx(rows, np.repeat(start, 2), np.repeat(end, 2), color=color, label=label, linewidth=0)


def _bins(start_s: Floats, end_s: Floats, values: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Edges in seconds [b + 1], and lowest, time-weighted mean and highest value [b] of neighbouring steps."""
    group = max(1, -(-len(values) // _MAX_BINS))
    first = np.arange(0, len(values), group)
    edges = np.append(start_s[first], end_s[-1])
    weight = np.maximum(end_s - start_s, 1e-12)
    mean = np.add.reduceat(values * weight, first) / np.add.reduceat(weight, first)
    return edges, np.minimum.reduceat(values, first), mean, np.maximum.reduceat(values, first)


def _mark_x(axes: Any, x: float, label: str, color: str, side: str) -> None:
    axes.axvline(x, color=color, linewidth=1.4)
    axes.annotate(
        label, (x, 1), xycoords=("data", "axes fraction"), textcoords="offset points", xytext=(0, 4),
        ha=side, va="bottom", color=color,
    )  # fmt: skip


def _legend(axes: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, handlelength=1.1, columnspacing=1.4)


def _end(end_s: Floats) -> float:
    return max(float(end_s.max()), 1e-6)


def _short(name: str) -> str:
    """An id fit for an axis: one line, not long, and `$` does not start a formula."""
    name = " ".join(name.split())
    return (name if len(name) <= 14 else name[:13] + "…").replace("$", r"\$")


def _markup(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element that can stand inside a page."""
    buffer = io.StringIO()
    figure.set_canvas(FigureCanvasSVG(figure))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has its own fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</defs>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", lambda tag: _clean_tag(tag[0], name), text)
    return re.sub(r"\n\s*", "\n", text)


def _clean_tag(tag: str, name: str) -> str:
    """Applied to tags only: what stands between them is text of the figure and stays as it is."""
    if tag.startswith("<svg "):
        tag = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", tag)
        tag = tag.replace("<svg ", f'<svg role="img" aria-labelledby="figure-{name}" ')
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)
    tag = re.sub(r" font-family: [^;]*;", "", tag)
    for stand_in, variable in _VARIABLES.items():
        tag = tag.replace(stand_in, f"var({variable})")
    return tag
