"""Plots of the demo's report: curves along training, radar, and verifier by category."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from miro.report.plots import PALETTE, PANEL, format_count, line_styles, styled


def value_range(series: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Axis limits that contain all of `series` with a margin."""
    values = [v for points in series for v in points if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


@styled
def score_curves(
    checkpoints: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    crossing: tuple[float, float] | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Plot a metric along training, one line per model.

    Args:
        checkpoints: Images trained on at each point.
        scores: Values per checkpoint by model; NaN where unknown.
        crossing: (images, score) from which MIRO stays above the baseline's final score.
        limits: Of the y axis.
    """
    figure = Figure(figsize=(3.7, 2.5))
    _score_curves(figure.add_axes(PANEL), checkpoints, scores, crossing, limits)
    return figure


def _score_curves(
    axes: Axes,
    checkpoints: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    crossing: tuple[float, float] | None,
    limits: tuple[float, float] | None,
) -> None:
    axes.set_ylim(*(limits or value_range(list(scores.values()))))
    axes.set_xlim(0, checkpoints[-1] * 1.03)
    if crossing is not None:
        images, score = crossing
        dotted = {"color": PALETTE["ink"], "linewidth": 1.1, "linestyle": (0, (2, 2))}
        axes.plot([images, checkpoints[-1]], [score, score], gid="saved", **dotted)
        axes.plot([images, images], [axes.get_ylim()[0], score], gid="since", **dotted)
    styles = line_styles(list(scores))
    for model, values in scores.items():
        style = styles[model]
        axes.plot(checkpoints, values, color=style.color, marker=style.marker)
    if crossing is not None:
        axes.plot(
            *([value] for value in crossing), gid="crossing", marker="o", markersize=9, zorder=5,
            markerfacecolor=PALETTE["paper"], markeredgecolor=PALETTE["ink"], markeredgewidth=1.6,
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(format_count))
    axes.set_xlabel("images", fontsize=9, loc="right")


@styled
def curves_sheet(panels: Sequence[Sequence[Mapping[str, Any]]], names: Mapping[str, str]) -> Figure:
    """Draw all curves in one figure.

    Args:
        panels: Rows of panels: "title", and the arguments of `score_curves`.
        names: Label of each model in the legend.
    """
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
    styles = line_styles(models)
    handles = [
        grid[0][0].plot([], [], color=styles[m].color, marker=styles[m].marker, label=names[m])[0]
        for m in models
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(models), fontsize=10)
    return figure


@styled
def radar(
    axes_names: Sequence[str], rims: Sequence[str], shares: Mapping[str, Sequence[float]]
) -> Figure:
    """Draw a radar chart.

    Args:
        axes_names: Name of each axis.
        rims: The value at the rim of each axis, as text.
        shares: Position on each axis by model, 0 at the center and 1 at the rim.
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
    styles = line_styles(list(shares))
    for model, values in shares.items():
        closed = [max(0.0, v) for v in (*values, values[0])]
        style = styles[model]
        outline = [*angles, angles[0]], closed
        axes.plot(*outline, color=style.color, marker=style.marker, clip_on=False)
        axes.fill(*outline, color=style.color, alpha=0.08, linewidth=0)
    for angle, name, rim in zip(angles, axes_names, rims, strict=True):
        across, up = math.sin(angle), math.cos(angle)
        side = "center" if abs(across) < 0.2 else "left" if across > 0 else "right"
        x, y = 0.5 + 0.32 * across, 0.5 + 0.42 * up
        # Two texts: matplotlib would place the lines of one by the metrics of another font.
        figure.text(x, y + 0.022, name, ha=side, va="center", fontsize=10.5)
        figure.text(x, y - 0.026, rim, ha=side, va="center", fontsize=9, color=PALETTE["muted"])
    return figure


@styled
def category_dots(categories: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Figure:
    """Plot a share from 0 to 1 per category: a row each, a marker per model."""
    height = 0.44 * len(categories) + 0.4
    figure = Figure(figsize=(5.4, height))
    axes = figure.add_axes((0.29, 0.34 / height, 0.65, 1 - 0.38 / height))
    styles = line_styles(list(shares))
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
            values, rows, linestyle="", marker=style.marker, markersize=8, color=style.color,
            markeredgecolor=PALETTE["paper"], markeredgewidth=1.0,
        )  # fmt: skip
    axes.set_yticks(rows, list(categories), color=PALETTE["ink"], fontsize=10.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    return figure


@styled
def png(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as a PNG on the page's background color."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=PALETTE["paper"])
    return buffer.getvalue()
