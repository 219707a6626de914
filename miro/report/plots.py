"""The plots of the reports, in one style: each function returns a figure, `svg` makes it markup.

Only matplotlib's object interface is used, never pyplot: no state outlives a call. In SVG every
colour of the palette becomes a CSS variable and text stays text, so that a plot follows the page
into a dark theme and takes its font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import FuncFormatter, MaxNLocator

# The names are those of the CSS variables in page.css; its light theme repeats these colours.
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
    "text.parse_math": False,  # a "$" in a user's name is a dollar, not a formula
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
"""Decorates a function that draws in this style, for plots made elsewhere."""

# Left, bottom, width, height of the axes in a panel: the same in each, so that neighbours line up.
_PANEL = (0.115, 0.165, 0.87, 0.81)


@dataclass(frozen=True)
class Look:
    """How a model is drawn, everywhere: shape tells it apart where colour does not."""

    name: str  # of the colour in PALETTE, and of the CSS variable
    marker: str

    @property
    def colour(self) -> str:
        return PALETTE[self.name]


def looks(models: Sequence[str]) -> dict[str, Look]:
    """A look for each model: fixed for the baseline and MIRO, in order for the others."""
    fixed = {"baseline": Look("baseline", "o"), "miro": Look("miro", "s")}
    spare = [Look("other-1", "^"), Look("other-2", "D"), Look("other-3", "v")]
    others = [model for model in models if model not in fixed]
    return fixed | {model: spare[k % len(spare)] for k, model in enumerate(others)}


def thousands(images: float, _: object = None) -> str:
    """Image counts as on an axis: 950, 12k, 1.5M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(images) >= size:
            return f"{images / size:g}{unit}"
    return f"{images:g}"


def value_range(series: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The limits of an axis that shows all of `series` with a little room."""
    values = [v for points in series for v in points if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


@rc_context(_STYLE)
def score_curves(
    marks: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    crossing: tuple[float, float] | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A metric along training, a line per model.

    marks: images. scores: model -> value per mark, NaN where not known. crossing: (images, score)
    at which MIRO passes the baseline's final score for good. limits: of the vertical axis.
    """
    figure = Figure(figsize=(3.7, 2.5))
    _score_curves(figure.add_axes(_PANEL), marks, scores, crossing, limits)
    return figure


def _score_curves(
    axes: Axes,
    marks: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    crossing: tuple[float, float] | None,
    limits: tuple[float, float] | None,
) -> None:
    axes.set_ylim(*(limits or value_range(list(scores.values()))))
    axes.set_xlim(0, marks[-1] * 1.03)
    if crossing is not None:
        images, score = crossing
        dotted = {"color": PALETTE["ink"], "linewidth": 1.1, "linestyle": (0, (2, 2))}
        axes.plot([images, marks[-1]], [score, score], gid="saved", **dotted)
        axes.plot([images, images], [axes.get_ylim()[0], score], gid="since", **dotted)
    styles = looks(list(scores))
    for model, values in scores.items():
        style = styles[model]
        axes.plot(marks, values, color=style.colour, marker=style.marker)
    if crossing is not None:
        axes.plot(
            *([value] for value in crossing), gid="crossing", marker="o", markersize=9, zorder=5,
            markerfacecolor=PALETTE["paper"], markeredgecolor=PALETTE["ink"], markeredgewidth=1.6,
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.set_xlabel("images", fontsize=9, loc="right")


@rc_context(_STYLE)
def curves_sheet(panels: Sequence[Sequence[Mapping[str, Any]]], names: Mapping[str, str]) -> Figure:
    """All curves as one picture. Each panel: title, and the arguments of `score_curves`."""
    columns = max(len(row) for row in panels)
    figure = Figure(figsize=(3.0 * columns, 2.35 * len(panels) + 0.4), layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for row, axes_row in zip(panels, grid, strict=True):
        for panel, axes in zip(row, axes_row, strict=False):
            axes.set_visible(True)
            arguments = dict(panel)
            axes.set_title(arguments.pop("title"), fontsize=10, loc="left", color=PALETTE["ink"])
            _score_curves(axes, **arguments)
    models = list(dict.fromkeys(m for row in panels for panel in row for m in panel["scores"]))
    styles = looks(models)
    handles = [
        grid[0][0].plot([], [], color=styles[m].colour, marker=styles[m].marker, label=names[m])[0]
        for m in models
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(models), fontsize=10)
    return figure


@rc_context(_STYLE)
def radar(
    axes_names: Sequence[str], rims: Sequence[str], shares: Mapping[str, Sequence[float]]
) -> Figure:
    """Closed outlines of the models: shares of each axis, 0 at the centre and 1 at the rim.

    rims: what the rim of each axis stands for, as text under its name.
    """
    figure = Figure(figsize=(4.4, 4.0))
    axes = cast(PolarAxes, figure.add_axes((0.2, 0.13, 0.6, 0.74), projection="polar"))
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    angles = [2 * math.pi * k / len(axes_names) for k in range(len(axes_names))]
    axes.set_xticks(angles, [""] * len(angles))
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], [""] * 4)
    axes.spines["polar"].set_visible(False)
    styles = looks(list(shares))
    for model, values in shares.items():
        closed = [max(0.0, v) for v in (*values, values[0])]
        style = styles[model]
        outline = [*angles, angles[0]], closed
        axes.plot(*outline, color=style.colour, marker=style.marker, clip_on=False)
        axes.fill(*outline, color=style.colour, alpha=0.08, linewidth=0)
    for angle, name, rim in zip(angles, axes_names, rims, strict=True):
        across, up = math.sin(angle), math.cos(angle)
        side = "center" if abs(across) < 0.2 else "left" if across > 0 else "right"
        x, y = 0.5 + 0.32 * across, 0.5 + 0.42 * up
        # Two texts of one line: SVG text that breaks is placed with the metrics of another font.
        figure.text(x, y + 0.022, name, ha=side, va="center", fontsize=10.5)
        figure.text(x, y - 0.026, rim, ha=side, va="center", fontsize=9, color=PALETTE["muted"])
    return figure


@rc_context(_STYLE)
def category_dots(categories: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Figure:
    """A share from 0 to 1 per category: a row each, a mark per model, a line across their range."""
    height = 0.44 * len(categories) + 0.4
    figure = Figure(figsize=(5.4, height))
    axes = figure.add_axes((0.29, 0.34 / height, 0.65, 1 - 0.38 / height))
    styles = looks(list(shares))
    rows = list(range(len(categories)))
    for row in rows:
        values = [v[row] for v in shares.values() if math.isfinite(v[row])]
        if values:
            axes.plot(
                [min(values), max(values)], [row, row], color=PALETTE["rule"], linewidth=5, zorder=1
            )
    for model, values in shares.items():
        style = styles[model]
        axes.plot(
            values, rows, linestyle="", marker=style.marker, markersize=8, color=style.colour,
            markeredgecolor=PALETTE["paper"], markeredgewidth=1.0,
        )  # fmt: skip
    axes.set_yticks(rows, list(categories), color=PALETTE["ink"], fontsize=10.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    return figure


@rc_context(_STYLE)
def training_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    log: bool = False,
    across: str = "images",
    named: bool = False,
) -> Figure:
    """What training reports, name -> (places, values); log: logarithmic where it can.

    across: what a place is. named: with a legend. Few places are drawn with marks, so that a single
    one is seen.
    """
    figure = Figure(figsize=(3.7, 2.5))
    axes = figure.add_axes(_PANEL)
    styles = looks(list(lines))
    for name, (places, values) in lines.items():
        look, marker = styles[name], styles[name].marker if len(places) < 3 else ""
        axes.plot(places, values, color=look.colour, marker=marker, linewidth=1.5, label=name)
    if named:
        axes.legend(fontsize=8, labelcolor=PALETTE["muted"], handlelength=1.2)
    values = [v for _, series in lines.values() for v in series if math.isfinite(v)]
    if log and values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(_first_digits))
    else:
        axes.set_ylim(bottom=0 if values and min(values) >= 0 else None)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.set_xlabel(across, fontsize=9, loc="right")
    return figure


def _first_digits(value: float, _: object = None) -> str:
    """The 2 and 5 between powers of ten: as many as there is room for."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


@rc_context(_STYLE)
def histogram(edges: Sequence[float], bars: Sequence[int], marks: Sequence[float]) -> Figure:
    """How many pairs have which score: a bar between two edges; `marks`: scores, marked below."""
    figure = Figure(figsize=(3.7, 2.5))
    axes = figure.add_axes((0.115, 0.165, 0.87, 0.74))
    axes.stairs(bars, edges, fill=True, color=PALETTE["baseline"])
    axes.set_xlim(edges[0], edges[-1])
    top = max(bars) * 1.05
    axes.set_ylim(-0.09 * top, top)
    inside = [mark for mark in marks if edges[0] <= mark <= edges[-1]]
    axes.vlines(inside, -0.07 * top, -0.01 * top, color=PALETTE["miro"], linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    ticks = MaxNLocator(5, integer=True).tick_values(0, top)
    axes.set_yticks([tick for tick in ticks if 0 <= tick <= top])
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    axes.set_xlabel("raw score", fontsize=9, loc="right")
    figure.text(0.01, 0.945, "pairs", fontsize=9, color=PALETTE["muted"])
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as markup to put into a page; `name` must be its own on the page."""
    buffer = io.StringIO()
    # The salt makes ids those of this figure alone; without a date equal figures are equal text.
    with rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
    # matplotlib numbers its groups from 1 in every figure; ids that nothing refers to would clash.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    for variable, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def png(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as a PNG on the page's paper colour."""
    buffer = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=PALETTE["paper"])
    return buffer.getvalue()
