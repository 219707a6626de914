"""Plots of the reports in one style.

Each function returns a matplotlib figure; `svg` converts it to markup. Only matplotlib's object
interface is used, not pyplot, which has global state. In SVG each color of the palette becomes a
CSS variable and text stays text, so a plot follows the page's theme and font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# The names are those of the CSS variables in page.css; its light theme repeats these colors.
PALETTE = {
    "ink": "#1c2530",
    "muted": "#5d6875",
    "rule": "#dedad2",
    "paper": "#fdfcfa",
    "baseline": "#66727f",
    "miro": "#cf4f0c",
    "other-1": "#1f78b4",
    "other-2": "#7b5ea7",
    "other-3": "#0f8a6d",
}
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": PALETTE["ink"],
    "text.parse_math": False,  # a "$" in a user's name is not a formula
    "axes.edgecolor": PALETTE["rule"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALETTE["rule"],
    "grid.linewidth": 0.7,
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
styled = rc_context(_STYLE)
"""Decorator of functions that draw in this style."""

PANEL = (0.115, 0.165, 0.87, 0.81)
"""Left, bottom, width and height of the axes in a figure: equal, so that neighbours line up."""


@dataclass(frozen=True)
class LineStyle:
    """Color and marker of a model, in all plots.

    Attributes:
        name: Of the color in PALETTE and of the CSS variable.
        marker: Matplotlib's; models differ in it too, not in color alone.
    """

    name: str
    marker: str

    @property
    def color(self) -> str:
        """The color as "#rrggbb"."""
        return PALETTE[self.name]


def line_styles(models: Sequence[str]) -> dict[str, LineStyle]:
    """A style per model: fixed for the baseline and MIRO, in order for the others."""
    fixed = {"baseline": LineStyle("baseline", "o"), "miro": LineStyle("miro", "s")}
    spare = [LineStyle("other-1", "^"), LineStyle("other-2", "D"), LineStyle("other-3", "v")]
    others = [model for model in models if model not in fixed]
    return fixed | {model: spare[k % len(spare)] for k, model in enumerate(others)}


def format_count(images: float, _: object = None) -> str:
    """An image count as on an axis: 950, 12k, 1.5M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(images) >= size:
            return f"{images / size:g}{unit}"
    return f"{images:g}"


@styled
def line_plot(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    log: bool = False,
    x_label: str = "images",
    legend: bool = False,
) -> Figure:
    """Plot training metrics.

    Args:
        lines: (x, y) values by name. Lines of fewer than three points are drawn with markers.
        log: Logarithmic y axis, if all values are positive and span more than a factor of 10.
        x_label: Label of the x axis.
        legend: Show the names.
    """
    figure = Figure(figsize=(3.7, 2.5))
    axes = figure.add_axes(PANEL)
    styles = line_styles(list(lines))
    for name, (x, y) in lines.items():
        style = styles[name]
        marker = style.marker if len(x) < 3 else ""
        axes.plot(x, y, color=style.color, marker=marker, linewidth=1.5, label=name)
    if legend:
        axes.legend(fontsize=8, labelcolor=PALETTE["muted"], handlelength=1.2)
    values = [v for _, y in lines.values() for v in y if math.isfinite(v)]
    if log and values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(_minor_label))
    else:
        axes.set_ylim(bottom=0 if values and min(values) >= 0 else None)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(format_count))
    axes.set_xlabel(x_label, fontsize=9, loc="right")
    return figure


def _minor_label(value: float, _: object = None) -> str:
    """Label only 2 and 5 between the powers of ten."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


@styled
def histogram(edges: Sequence[float], counts: Sequence[int], marks: Sequence[float]) -> Figure:
    """Plot the distribution of raw scores.

    Args:
        edges: The n + 1 bar edges.
        counts: Pairs per bar, n.
        marks: Scores marked below the axis, such as the edges of the quantile bins.
    """
    figure = Figure(figsize=(3.7, 2.5))
    axes = figure.add_axes((0.115, 0.165, 0.87, 0.74))
    axes.stairs(counts, edges, fill=True, color=PALETTE["baseline"])
    axes.set_xlim(edges[0], edges[-1])
    top = max(counts) * 1.05
    axes.set_ylim(-0.09 * top, top)
    inside = [mark for mark in marks if edges[0] <= mark <= edges[-1]]
    axes.vlines(inside, -0.07 * top, -0.01 * top, color=PALETTE["miro"], linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    ticks = MaxNLocator(5, integer=True).tick_values(0, top)
    axes.set_yticks([tick for tick in ticks if 0 <= tick <= top])
    axes.yaxis.set_major_formatter(FuncFormatter(format_count))
    axes.set_xlabel("raw score", fontsize=9, loc="right")
    figure.text(0.01, 0.945, "pairs", fontsize=9, color=PALETTE["muted"])
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as SVG markup for inlining; `name` must be unique on the page."""
    buffer = io.StringIO()
    # The hash salt makes ids unique on the page; without a date equal figures give equal markup.
    with rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
    # matplotlib numbers its groups from 1 in every figure, so unreferenced ids would clash.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    for variable, color in PALETTE.items():
        text = text.replace(color, f"var(--{variable})")
    return text
