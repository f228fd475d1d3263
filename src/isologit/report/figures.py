"""The figures of a run: arrays in, a string of SVG markup out. Knows no files, verdicts or page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from isologit.report.svg import (
    BLUE,
    GRID,
    MUTED,
    ORANGE,
    RED,
    Floats,
    drawing,
    legend,
    mark_x,
    markup,
    new_figure,
)

_MAX_BINS = 1200  # points along a time axis; more steps than this are drawn as range and mean of neighbours
_NAMED_ROWS = 32  # up to this many requests have their ids on the axis


def request_timeline(
    ids: Sequence[str],
    arrival_s: Floats,
    scheduled_s: Floats,
    first_token_s: Floats,
    finished_s: Floats,
    *,
    name: str = "timeline",
    phases: tuple[str, str, str] = ("queue", "prefill", "decode"),
) -> str:
    """One row per request, in order of start, with the three phases between its four times. Arrays are [n]."""
    order = np.lexsort((finished_s, scheduled_s))
    count = len(order)
    bounds = [series[order] for series in (arrival_s, scheduled_s, first_token_s, finished_s)]
    named = count <= _NAMED_ROWS
    height = 1.2 + 0.21 * count if named else 4.6
    with drawing(name):
        figure, axes = new_figure(height)
        colors = (GRID, ORANGE, BLUE)
        for label, color, start, end in zip(phases, colors, bounds, bounds[1:], strict=False):
            if named:
                axes.barh(np.arange(count), end - start, left=start, height=0.72, color=color, label=label, linewidth=0)
            else:
                _fill_rows(axes, start, end, color, label)
        if named:
            axes.set_yticks(np.arange(count), [_short(ids[i]) for i in order])
            axes.grid(axis="y", visible=False)
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_xlim(0, _end(bounds[-1]))
        axes.set_ylabel("request" if named else "requests, in order of start")
        axes.set_xlabel("seconds since the run began")
        legend(axes)
        return markup(figure, name)


def batch_over_time(start_s: Floats, end_s: Floats, num_seqs: Floats, num_tokens: Floats) -> str:
    """Sequences and tokens of each step against time; arrays are [steps]."""
    with drawing("batch"):
        figure, (upper, lower) = new_figure(4.6, rows=2, share_x=True)
        for axes, values, color, label in (
            (upper, num_seqs, BLUE, "sequences in a step"),
            (lower, num_tokens, ORANGE, "tokens in a step"),
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
        return markup(figure, "batch")


def delta_histogram(edges: Floats, counts: Floats, *, tolerance: float, noise_floor: float | None) -> str:
    """How many compared logits lie how far from the reference; `edges` [n + 1] ascend and may begin with 0."""
    with drawing("histogram"):
        figure, axes = new_figure(3.5)
        positive = edges[edges > 0]
        start = positive[0] / 10 if edges[0] <= 0 else positive[0]
        drawn = np.maximum(edges, start)
        over = edges[:-1] >= tolerance
        axes.stairs(np.where(over, 0, counts), drawn, fill=True, color=BLUE, linewidth=0)
        axes.stairs(np.where(over, counts, 0), drawn, fill=True, color=RED, linewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        occupied = np.flatnonzero(counts)
        left = drawn[occupied[0]] if len(occupied) else start
        right = max(tolerance * 20, drawn[occupied[-1] + 1] if len(occupied) else 0.0)
        axes.set_xlim(left / 1.3, right * 1.3)
        axes.set_ylim(0.7, max(10.0, float(counts.max()) * 6) if len(counts) else 10.0)
        mark_x(axes, tolerance, f"tolerance {tolerance:g}", RED, "left")
        if noise_floor:
            mark_x(axes, noise_floor, f"noise floor {noise_floor:.1e}", MUTED, "right")
        axes.set_xlabel("|Δlogit| against the reference")
        axes.set_ylabel("logits")
        axes.grid(axis="x", visible=False)
        return markup(figure, "histogram")


def delta_against_logit(logit: Floats, delta: Floats, *, tolerance: float) -> str:
    """|Δlogit| of sampled entries against the |logit| of the reference, with half an fp16 step for scale."""
    keep = (delta > 0) & (logit > 0)
    logit, delta = logit[keep], delta[keep]
    with drawing("scatter"):
        figure, axes = new_figure(3.6)
        axes.plot(logit, delta, ".", color=BLUE, markersize=3.2, alpha=0.55, markeredgewidth=0)
        grid = np.linspace(0, float(logit.max()) if len(logit) else 10.0, 800)[1:]
        axes.plot(grid, _half_fp16_step(grid), color=ORANGE, linewidth=1.4)
        axes.annotate(
            "half an fp16 step", (grid[400], _half_fp16_step(grid)[400]),
            textcoords="offset points", xytext=(0, -6), va="top", color=ORANGE,
        )  # fmt: skip
        axes.axhline(tolerance, color=RED, linewidth=1.4)
        axes.annotate(
            f"tolerance {tolerance:g}", (0, tolerance),
            textcoords="offset points", xytext=(4, 4), color=RED,
        )  # fmt: skip
        axes.set_xlim(0, None)
        axes.set_yscale("log")
        axes.set_xlabel("|logit| of the reference")
        axes.set_ylabel("|Δlogit|")
        return markup(figure, "scatter")


def _half_fp16_step(values: Floats) -> Floats:
    return np.spacing(np.minimum(values, 6e4).astype(np.float16)).astype(np.float64) / 2


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


def _end(end_s: Floats) -> float:
    return max(float(end_s.max()), 1e-6)


def _short(name: str) -> str:
    """An id fit for an axis: one line, not long, and `$` does not start a formula."""
    name = " ".join(name.split())
    return (name if len(name) <= 14 else name[:13] + "…").replace("$", r"\$")
