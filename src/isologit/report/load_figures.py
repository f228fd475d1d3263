"""The figures of load runs: arrays in, a string of SVG markup out. Knows no files, verdicts or page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lgamma
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from isologit.report.svg import BLUE, GREEN, INK, MUTED, ORANGE, Floats, drawing, legend, markup, new_figure

Bools = npt.NDArray[np.bool_]

_CDF_POINTS = 300  # a curve is drawn through at most this many quantiles
_MAX_STEPS = 1500  # points of a concurrency curve; beyond, the highest of neighbours is drawn
_GAP_BINS = 40
_LEAST_VARIATION = 0.05  # gaps more even than this have no curve worth drawing
_COLORS = (BLUE, GREEN, ORANGE)


def throughput_against_rate(rates: Floats, requests: Floats, tokens: Floats, valid: Bools) -> str:
    """Requests and output tokens a second against requests a second offered; arrays are [runs], rates ascend.

    An infinite rate stands at the right edge. Runs that do not count are grey.
    """
    with drawing("throughput"):
        figure, (left, right) = new_figure(3.6, columns=2)
        x, edge = _positions(rates)
        left.plot([0, edge], [0, edge], color=MUTED, linewidth=1, linestyle=":")
        _series(left, x, requests, valid, BLUE)
        _series(right, x, tokens, valid, ORANGE)
        top = 1.15 * max(float(np.nanmax(requests)), 1e-9)
        left.set_ylim(0, top)
        name, place = "all that is offered", (0.9 * top, 0.9 * top)
        side = {"xytext": (6, 0), "ha": "left"} if place[0] < edge / 2 else {"xytext": (-6, 0), "ha": "right"}
        left.annotate(name, place, textcoords="offset points", color=MUTED, **side)
        right.set_ylim(0, None)
        for axes, title in ((left, "answered requests a second"), (right, "output tokens a second")):
            axes.set_title(title, loc="left", fontsize=10.5)
            _rate_axis(axes, rates, x)
        return markup(figure, "throughput")


def latency_against_rate(rates: Floats, panels: Mapping[str, Mapping[str, Floats]], valid: Bools) -> str:
    """Milliseconds against requests a second offered: a panel per metric, in it a line per statistic [runs]."""
    with drawing("latency"):
        figure, all_axes = new_figure(3.8, columns=len(panels))
        x, _ = _positions(rates)
        for axes, (title, lines) in zip(np.atleast_1d(all_axes), panels.items(), strict=True):
            for (label, values), color in zip(lines.items(), _COLORS, strict=False):
                _series(axes, x, values, valid, color, label)
            _log_milliseconds(axes)
            axes.set_title(title, loc="left", fontsize=10.5, pad=24)
            _rate_axis(axes, rates, x)
        first = np.atleast_1d(all_axes)[0]
        first.set_ylabel("milliseconds")
        legend(first)
        return markup(figure, "latency")


def latency_against_throughput(
    throughput: Floats, lines: Mapping[str, Floats], labels: Sequence[str], valid: Bools
) -> str:
    """Where more load stops to bring more answers: latency in ms against requests a second answered, [runs]."""
    with drawing("knee"):
        figure, axes = new_figure(3.8)
        for (label, values), color in zip(lines.items(), _COLORS, strict=False):
            _series(axes, throughput, values, valid, color, label)
        top = np.nanmax(np.array(list(lines.values())), axis=0)
        for x, y, label in zip(throughput, top, labels, strict=True):
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(0, 7), ha="center", color=MUTED)
        _log_milliseconds(axes)
        axes.margins(x=0.08, y=0.18)
        axes.set_xlabel("answered requests a second")
        axes.set_ylabel("milliseconds")
        legend(axes)
        return markup(figure, "knee")


def distributions(panels: Mapping[str, Sequence[Floats]], labels: Sequence[str]) -> str:
    """Share of values that are at most so large: a panel per metric, in it a curve per run, later ones darker."""
    with drawing("cdf"):
        figure, all_axes = new_figure(3.8, columns=len(panels))
        shades = np.linspace(0.35, 1.0, len(labels)) if len(labels) > 1 else np.ones(1)
        for axes, (title, runs) in zip(np.atleast_1d(all_axes), panels.items(), strict=True):
            for values, label, shade in zip(runs, labels, shades, strict=True):
                if len(values):
                    share = np.linspace(0, 1, min(_CDF_POINTS, len(values) + 1))
                    axes.plot(np.quantile(values, share), 100 * share, color=BLUE, alpha=shade, label=label)
            axes.set_title(title, loc="left", fontsize=10.5)
            axes.set_xlabel("milliseconds")
            axes.set_ylim(0, 100.5)
            axes.set_xlim(0, None)
            axes.xaxis.get_major_locator().set_params(nbins=5)
        first = np.atleast_1d(all_axes)[0]
        first.set_ylabel("percent")
        if len(labels) > 1:
            first.legend(loc="lower right", handlelength=1.1)
        return markup(figure, "cdf")


def concurrency_over_time(sent_s: Floats, finished_s: Floats, *, name: str) -> str:
    """Requests that are being answered, against time; arrays are [requests]."""
    edges, count = requests_at_once(sent_s, finished_s)
    group = max(1, -(-len(edges) // _MAX_STEPS))
    starts = np.arange(0, len(edges), group)
    with drawing(name):
        figure, axes = new_figure(2.8)
        highest = np.maximum.reduceat(count, starts)
        axes.stairs(highest, np.append(edges[starts], edges[-1] + 1e-9), fill=True, color=BLUE, alpha=0.25, linewidth=0)
        axes.stairs(highest, np.append(edges[starts], edges[-1] + 1e-9), color=BLUE, linewidth=1.2, baseline=None)
        axes.set_xlim(0, max(float(edges[-1]), 1e-6))
        axes.set_ylim(0, None)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.set_ylabel("requests at once")
        axes.set_xlabel("seconds since the first request was due")
        return markup(figure, name)


def requests_at_once(sent_s: Floats, finished_s: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Moments [2 n] at which a request is sent or ends, and how many are being answered from each on."""
    times = np.concatenate([sent_s, finished_s])
    begins = np.repeat([1, -1], len(sent_s))
    order = np.lexsort((begins, times))  # at one moment, what ends goes before what begins
    return times[order], np.cumsum(begins[order])


def gap_histogram(due_s: Floats, *, name: str) -> str:
    """Gaps between arrivals, with the exponential and the gamma distribution of the same mean (and variance)."""
    gaps = 1000 * np.diff(due_s)
    mean, variation = float(gaps.mean()), float(gaps.std() / gaps.mean())
    with drawing(name):
        figure, axes = new_figure(3.2)
        edges = np.linspace(0, max(float(np.quantile(gaps, 0.995)), mean * 1.5), _GAP_BINS + 1)
        counts, _ = np.histogram(gaps, edges)
        density = counts / (len(gaps) * np.diff(edges))
        axes.stairs(density, edges, fill=True, color=BLUE, alpha=0.3, linewidth=0, label=f"{len(gaps)} gaps")
        grid = np.linspace(edges[0], edges[-1], 400)[1:]
        axes.plot(grid, np.exp(-grid / mean) / mean, color=ORANGE, label="exponential (Poisson arrivals)")
        if variation > _LEAST_VARIATION:
            shape = variation**-2
            axes.plot(
                grid,
                _gamma_density(grid, shape, mean / shape),
                color=INK,
                linewidth=1.2,
                label=f"gamma, shape {shape:.2g}",
            )
        axes.set_ylim(0, 1.2 * max(float(density.max()), 1 / mean))
        axes.set_xlim(0, edges[-1])
        axes.set_xlabel(f"milliseconds between arrivals; mean {mean:.3g}, variation {100 * variation:.3g} %")
        axes.set_ylabel("density")
        axes.set_yticklabels([])
        legend(axes)
        return markup(figure, name)


def _gamma_density(x: Floats, shape: float, scale: float) -> Floats:
    density: Floats = np.exp((shape - 1) * np.log(x) - x / scale - lgamma(shape) - shape * np.log(scale))
    return density


def _positions(rates: Floats) -> tuple[Floats, float]:
    """Where rates stand on an axis, and its end: an infinite one stands a little beyond the largest."""
    finite = rates[np.isfinite(rates)]
    largest = float(finite.max()) if len(finite) else 1.0
    return np.where(np.isfinite(rates), rates, 1.25 * largest), 1.3 * largest


def _rate_axis(axes: Any, rates: Floats, x: Floats) -> None:
    axes.set_xlim(0, float(x.max()) * 1.06)
    axes.set_xticks(x, [f"{rate:g}" for rate in rates])
    axes.set_xlabel("requests a second offered")


def _log_milliseconds(axes: Any) -> None:
    """A logarithmic axis with plain numbers on it, even where it spans less than a factor of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _series(axes: Any, x: Floats, y: Floats, valid: Bools, color: str, label: str | None = None) -> None:
    """A line through the runs; the points of those that do not count are hollow and grey."""
    axes.plot(x, y, color=color, linewidth=1.4, label=label)
    axes.plot(x[valid], y[valid], "o", color=color, markersize=5)
    axes.plot(x[~valid], y[~valid], "o", color=MUTED, markersize=5, markerfacecolor="none")
