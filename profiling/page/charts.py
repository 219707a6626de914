"""Charts of the profiling page, in the style of the run reports (miro/report/plots.py).

Axes have fixed positions and coordinates are rounded, so that equal values give equal bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from roofline import Device, by_group

from miro.report import plots
from miro.report.plots import PALETTE
from miro.report.render import number
from page.result_files import Quantity, Spread

_WIDTH = 5.4  # inches
_LETTER_WIDTH = 0.078  # inches
_LONGEST_LABEL = 38  # letters
_TEXT_BOX = {"facecolor": PALETTE["paper"], "linewidth": 0, "pad": 0.6}
_PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")
_MARKERS = "osD^vP"
_SPARE = ("other-3", "other-1", "other-2", "baseline", "miro", "ink")
_COLOURS = dict.fromkeys(
    ("ours", "kernels", "fused", "one pass", "MIRO", "measured", "compiled", "ours with DALI"),
    "miro",
) | {
    "eager": "baseline", "projection": "baseline", "separate passes": "baseline",
    "Pillow": "baseline", "torch.compile": "other-1", "released": "other-2",
    "published": "other-2",
}  # fmt: skip


def _colours(names: Sequence[str]) -> dict[str, str]:
    spare = [name for name in names if name not in _COLOURS]
    return {
        name: PALETTE[_COLOURS.get(name) or _SPARE[spare.index(name) % len(_SPARE)]]
        for name in names
    }


@plots.styled
def bars(
    values: Mapping[str, Mapping[str, Quantity]],
    unit: str,
    *,
    reference: float | None = None,
    log: bool = False,
) -> Figure:
    """Draw horizontal bars, one per series for each label.

    Args:
        values: label -> series -> value; a line shows the range of a `Spread`.
        unit: title of the axis.
        reference: value of a dotted line.
        log: draw points on a logarithmic axis instead.
    """
    series = list(dict.fromkeys(name for row in values.values() for name in row))
    step = 0.17 if len(series) > 1 else 0.22
    figure, axes = _label_axes({k: len(row) * step + 0.09 for k, row in values.items()}, series)
    colours = _colours(series)
    spreads = [_spread(value) for row in values.values() for value in row.values()]
    most = max(spread.p80 for spread in spreads)
    least = 10 ** (math.log10(min(spread.median for spread in spreads)) - 0.25) if log else 0.0
    top = 0.0
    for row in values.values():
        for position, (name, value) in enumerate(row.items()):
            y = top + 0.045 + (position + 0.5) * step
            median, low, high = _spread(value)
            if log:
                axes.plot([least, median], [y, y], color=PALETTE["rule"], linewidth=3)
                axes.plot([median], [y], color=colours[name], marker="o", markersize=7)
            else:
                axes.barh(y, median, step * 0.82, color=colours[name], linewidth=0)
            if high > low:
                axes.plot([low, high], [y, y], color=PALETTE["ink"], linewidth=1.2)
            _annotate(axes, number(median), (max(median, high), y), (8 if log else 4, 0))
        top += len(row) * step + 0.09
    if log:
        axes.set_xscale("log")
        axes.set_xlim(least, most * (most / least) ** 0.24)
        _log_ticks(axes.xaxis, (1.0,))
    else:
        axes.set_xlim(0, most * 1.14 or 1)
        _linear_ticks(axes.xaxis)
    if reference is not None:
        axes.axvline(reference, color=PALETTE["ink"], linewidth=1.1, linestyle=(0, (2, 2)))
    axes.set_xlabel(unit, fontsize=9, loc="right")
    return figure


@plots.styled
def lines(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    unit: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw a line per series over evenly spaced labels; NaN leaves a gap.

    The vertical axis is logarithmic unless `limits` are given.
    """
    height = 2.42 + 0.2 * math.ceil(len(series) / 2)
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0.1, 0.42 / height, 0.87, 1.88 / height))
    colours = _colours(list(series))
    for marker, (name, values) in zip(_MARKERS, series.items(), strict=False):
        axes.plot(range(len(labels)), values, color=colours[name], marker=marker, label=name)
    axes.set_xticks(range(len(labels)), list(labels), fontsize=9)
    axes.set_xlim(-0.3, len(labels) - 0.7)
    if limits is None:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
    else:
        axes.set_ylim(*limits)
        _linear_ticks(axes.yaxis)
    axes.set_xlabel(unit, fontsize=9, loc="right")
    _legend(figure, axes, 2)
    return figure


@plots.styled
def roofline_chart(variants: Mapping[str, Any], device: Device) -> Figure:
    """Draw the groups with FLOPs, and the whole step, by FLOPs per byte and projected rate."""
    height = 3.3
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0.12, 0.44 / height, 0.83, 2.5 / height))
    ridge = device.flops / device.bandwidth
    points = [(ridge, device.flops / 1e12)]
    colours = _colours(list(variants))
    for position, (variant, operations) in enumerate(variants.items()):
        groups = by_group(operations)
        groups.loc["whole step"] = groups.sum()
        groups = groups[(groups["flops"] > 0) & (groups["bytes"] > 0)]
        x, y = groups["flops"] / groups["bytes"], groups["flops"] / groups["seconds"] / 1e12
        points += zip(x, y, strict=True)
        axes.plot(
            x, y, linestyle="", marker=_MARKERS[position], markersize=8, label=variant,
            color=colours[variant], markeredgecolor=PALETTE["paper"], markeredgewidth=0.8,
        )  # fmt: skip
        side, offset = ("right", (-6, 6)) if position else ("left", (6, -12))
        for name in groups.index:
            _annotate(axes, str(name), (x[name], y[name]), offset, ha=side, color=colours[variant])
    axes.set_xscale("log")
    axes.set_yscale("log")
    left, bottom = (min(values) / 3 for values in zip(*points, strict=True))
    right, top = (max(values) * 3 for values in zip(*points, strict=True))
    roof = [min(device.flops, device.bandwidth * end) / 1e12 for end in (left, ridge, right)]
    axes.plot([left, ridge, right], roof, color=PALETTE["ink"], linewidth=1.2)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    _log_ticks(axes.xaxis)
    _log_ticks(axes.yaxis)
    axes.set_xlabel("FLOPs per byte", fontsize=9, loc="right")
    for text, at, side in (
        ("TFLOP/s", (0.015, 0.94), "left"),
        ("Projection: nothing was timed", (0.98, 0.05), "right"),
    ):
        axes.annotate(
            text, at, xycoords="axes fraction", ha=side, fontsize=9, color=PALETTE["muted"]
        )
    _legend(figure, axes, 3)
    return figure


def svg(figure: Figure, name: str) -> str:
    """SVG of a figure for a page that defines the colours; `name` is unique on the page."""

    def round_numbers(match: re.Match[str]) -> str:
        return re.sub(r"\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}", match[0])

    attributes = r' (?:d|x|y|width|height|transform|points)="[^"]*"'
    return re.sub(attributes, round_numbers, plots.svg(figure, name))


def _label_axes(heights: Mapping[str, float], series: Sequence[str]) -> tuple[Figure, Axes]:
    """Axes with a row per label, of the given heights in inches, and a legend above."""
    labels = [n if len(n) <= _LONGEST_LABEL else f"{n[:_LONGEST_LABEL]}…" for n in heights]
    left = 0.12 + _LETTER_WIDTH * max(map(len, labels))
    columns = max(1, int((_WIDTH - 0.2) / (0.42 + _LETTER_WIDTH * max(map(len, series)))))
    legend = 0.04 if len(series) < 2 else 0.06 + 0.2 * math.ceil(len(series) / columns)
    rows = sum(heights.values())
    height = rows + legend + 0.42
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes(
        (left / _WIDTH, 0.42 / height, 1 - (left + 0.12) / _WIDTH, rows / height)
    )
    ends = pd.Series(heights).cumsum()
    axes.set_yticks(ends - pd.Series(heights) / 2, labels, color=PALETTE["ink"], fontsize=9.5)
    axes.set_ylim(rows, 0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    if len(series) > 1:
        for name, colour in _colours(series).items():
            axes.plot([], [], linestyle="", marker="s", markersize=6, color=colour, label=name)
        _legend(figure, axes, columns)
    return figure, axes


def _annotate(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    *,
    ha: str = "left",
    color: str = PALETTE["muted"],
) -> None:
    axes.annotate(
        text, at, offset, textcoords="offset points", ha=ha,
        va="baseline" if offset[1] else "center", fontsize=8.5, color=color, bbox=_TEXT_BOX,
    )  # fmt: skip


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    axes.legend(
        loc="upper left", bbox_to_anchor=(0.005, 1 - 0.02 / figure.get_size_inches()[1]),
        ncols=columns, bbox_transform=figure.transFigure, fontsize=9, borderaxespad=0,
        handletextpad=0.4, columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip


def _linear_ticks(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(_PLAIN)


def _log_ticks(axis: Axis, multiples: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    axis.set_major_locator(LogLocator(base=10, subs=multiples, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_PLAIN)


def _spread(value: Quantity) -> Spread:
    return value if isinstance(value, Spread) else Spread(value, value, value)
