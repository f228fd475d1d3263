"""How a figure looks, and how the SVG of matplotlib is made fit for a page.

Text stays text, colours become CSS variables (one figure serves the light and the dark page), ids are unique to their
figure, coordinates are short, and nothing in the markup names an address. It does not know what is drawn.
"""

from __future__ import annotations

import io
import re
import warnings
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

# Stand-ins that matplotlib draws with, and the CSS variables they become. The page gives the variables their values.
INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
BLUE, ORANGE, GREEN, RED = "#010105", "#010106", "#010107", "#010108"
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card",
    BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", RED: "--red",
}  # fmt: skip

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
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


def drawing(name: str) -> AbstractContextManager[None]:
    """While it is entered, figures look like the page's; `name` keeps their ids the same every time."""
    context: AbstractContextManager[None] = mpl.rc_context({**_STYLE, "svg.hashsalt": name})
    return context


def new_figure(height_in: float, rows: int = 1, columns: int = 1, *, share_x: bool = False) -> tuple[Figure, Any]:
    """A figure of the page's width, and its axes: one, or an array of them."""
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=share_x)


def mark_x(axes: Any, x: float, label: str, color: str, side: str) -> None:
    """A vertical line with its name above it."""
    axes.axvline(x, color=color, linewidth=1.4)
    axes.annotate(
        label, (x, 1), xycoords=("data", "axes fraction"), textcoords="offset points", xytext=(0, 4),
        ha=side, va="bottom", color=color,
    )  # fmt: skip


def legend(axes: Any) -> None:
    """Names of what is drawn, above the axes."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, handlelength=1.1, columnspacing=1.4)


def markup(figure: Figure, name: str) -> str:
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
