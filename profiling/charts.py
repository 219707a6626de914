"""The plots of results, in the style of the reports (miro/report/plots.py).

Each function returns a figure. `markup` makes it SVG for a page that has the colours, `standalone`
SVG that brings them, light and dark, for a file of its own. Axes lie at fixed places and
coordinates are rounded, so that equal numbers give equal bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from result_files import Quantity, Spread
from roofline import Device, Row, grouped, seconds_by_group

from miro.report import plots
from miro.report.plots import PALETTE
from miro.report.render import number, page_colours

WIDTH = 5.4  # inches, of which the page makes 520 pixels
_COUNTS = ("flops", "bytes")
_BEHIND = {"facecolor": PALETTE["paper"], "linewidth": 0, "pad": 0.6}  # text over a line
_LETTER = 0.078  # inches of a letter of a label, on the safe side
# What is ours has the colour of MIRO everywhere, and a rival its own.
_FIXED = {
    "ours": "miro", "kernels": "miro", "fused": "miro", "together": "miro", "MIRO": "miro",
    "measured": "miro", "compiled": "miro", "ours with DALI": "miro", "eager": "baseline",
    "projection": "baseline", "apart": "baseline", "Pillow": "baseline",
    "torch.compile": "other-1", "released": "other-2", "published": "other-2",
}  # fmt: skip
_SPARE = ("other-3", "other-1", "other-2", "baseline", "miro", "ink")
_LONGEST = 38  # letters of a label; the rest is cut
_MARKERS = "osD^vP"
_STEPS = [1, 2, 2.5, 5, 10]


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour of the palette for each name."""
    spare = [name for name in names if name not in _FIXED]
    order = {name: _SPARE[k % len(_SPARE)] for k, name in enumerate(spare)}
    return {name: PALETTE[_FIXED.get(name) or order[name]] for name in names}


@plots.styled
def bars(
    values: Mapping[str, Mapping[str, Quantity]], unit: str, *, mark: float | None = None
) -> Figure:
    """A row of bars per label, one a series, its value behind it.

    values: label -> series -> value, or median with p20 and p80, which a line across the end shows.
    unit: under the axis. mark: a value to compare with, a dotted line.
    """
    series = list(dict.fromkeys(name for row in values.values() for name in row))
    step = 0.17 if len(series) > 1 else 0.22
    figure, axes = _rows(list(values), [len(row) * step + 0.09 for row in values.values()], series)
    fills, top = colours(series), 0.0
    centre = 0.0
    for row in values.values():
        high = len(row) * step + 0.09
        for place, (name, value) in enumerate(row.items()):
            y = centre + 0.045 + (place + 0.5) * step
            middle, low, most = _spread(value)
            axes.barh(y, middle, step * 0.82, color=fills[name], linewidth=0)
            if most > low:
                axes.plot([low, most], [y, y], color=PALETTE["ink"], linewidth=1.2)
            axes.annotate(
                number(middle), (max(middle, most), y), (4, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=PALETTE["muted"],
                bbox=_BEHIND,
            )  # fmt: skip
            top = max(top, most)
        centre += high
    axes.set_xlim(0, top * 1.14 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    _finish(axes, unit, mark)
    return figure


@plots.styled
def dots(values: Mapping[str, float], unit: str) -> Figure:
    """A value per label on a logarithmic axis, for what spans orders of magnitude."""
    figure, axes = _rows(list(values), [0.24] * len(values), [])
    least, most = min(values.values()), max(values.values())
    start = 10 ** (math.log10(least) - 0.25)
    for place, (name, value) in enumerate(values.items()):
        y, ours = (place + 0.5) * 0.24, name.startswith("ours")
        colour = PALETTE["miro" if ours else "other-2" if "released" in name else "baseline"]
        axes.plot([start, value], [y, y], color=PALETTE["rule"], linewidth=3)
        axes.plot([value], [y], color=colour, marker="o", markersize=7)
        axes.annotate(
            number(value), (value, y), (8, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=PALETTE["muted"],
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(start, most * (most / start) ** 0.24)
    _decades(axes.xaxis)
    _finish(axes, unit, None)
    return figure


@plots.styled
def lines(
    places: Sequence[str],
    series: Mapping[str, Sequence[float]],
    unit: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Values at `places`, evenly spaced, a line per series, NaN where there is none.

    limits: of the vertical axis, which is logarithmic without them.
    """
    head = 0.2 * math.ceil(len(series) / 2) + 0.12
    height = 2.3 + head
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.1, 0.42 / height, 0.87, 1.88 / height))
    fills = colours(list(series))
    for place, (name, values) in enumerate(series.items()):
        marker = _MARKERS[place % len(_MARKERS)]
        axes.plot(range(len(places)), values, color=fills[name], marker=marker, label=name)
    axes.set_xticks(range(len(places)), list(places), fontsize=9)
    axes.set_xlim(-0.3, len(places) - 0.7)
    if limits is None:
        axes.set_yscale("log")
        _decades(axes.yaxis, (1.0, 2.0, 5.0))
    else:
        axes.set_ylim(*limits)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel(unit, fontsize=9, loc="right")
    _legend(figure, axes, 2, height)
    return figure


@plots.styled
def roofline_plot(variants: Mapping[str, Sequence[Row]], device: Device) -> Figure:
    """Each group that computes, and the whole step, by FLOPs a byte and projected rate.

    What only moves bytes has no place here, and is a part of the whole step.
    """
    height = 3.3
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.12, 0.44 / height, 0.83, 2.5 / height))
    ridge = device.flops / device.bandwidth
    fills, points = colours(list(variants)), [(ridge, device.flops / 1e12)]
    for place, (variant, rows) in enumerate(variants.items()):
        seconds = seconds_by_group(rows, device)
        whole = Row("", "whole step", 1, 0, *(sum(getattr(r, k) for r in rows) for k in _COUNTS))
        seconds[whole.group] = sum(seconds.values())
        for row in (*grouped(rows), whole):
            if not row.flops or not row.bytes:
                continue
            point = row.flops / row.bytes, row.flops / seconds[row.group] / 1e12
            points.append(point)
            axes.plot(
                *([value] for value in point), linestyle="", marker=_MARKERS[place], markersize=8,
                color=fills[variant], markeredgecolor=PALETTE["paper"], markeredgewidth=0.8,
            )  # fmt: skip
            # The first variant is told on the right below its points, the others left above.
            side, to = ("right", (-6, 6)) if place else ("left", (6, -12))
            axes.annotate(
                row.group, point, to, textcoords="offset points", ha=side, fontsize=8.5,
                color=fills[variant], bbox=_BEHIND,
            )  # fmt: skip
        axes.plot([], [], linestyle="", marker=_MARKERS[place], color=fills[variant], label=variant)
    axes.set_xscale("log")
    axes.set_yscale("log")
    left, low = (min(values) / 3 for values in zip(*points, strict=True))
    right, high = (max(values) * 3 for values in zip(*points, strict=True))
    ends = [min(device.flops, device.bandwidth * end) / 1e12 for end in (left, ridge, right)]
    axes.plot([left, ridge, right], ends, color=PALETTE["ink"], linewidth=1.2)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    _decades(axes.xaxis, (1.0, 2.0, 5.0))
    _decades(axes.yaxis, (1.0, 2.0, 5.0))
    axes.set_xlabel("FLOPs a byte", fontsize=9, loc="right")
    axes.annotate(
        "TFLOP/s", (0.015, 0.94), xycoords="axes fraction", fontsize=9, color=PALETTE["muted"]
    )
    axes.annotate(
        "Projection: nothing here was timed", (0.98, 0.05), xycoords="axes fraction", ha="right",
        fontsize=9, color=PALETTE["muted"],
    )  # fmt: skip
    _legend(figure, axes, 3, height)
    return figure


def markup(figure: Figure, name: str) -> str:
    """The figure as SVG for a page; `name` must be its own on the page."""

    def rounded(found: re.Match[str]) -> str:
        return re.sub(r"\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}", found[0])

    # Only what places things: the numbers a reader sees are text, and stay as they are.
    placing = r' (?:d|x|y|width|height|transform|points)="[^"]*"'
    return re.sub(placing, rounded, plots.svg(figure, name))


def standalone(figure: Figure, name: str, title: str, note: str) -> str:
    """The figure as an SVG file under its title, which follows the reader's theme by itself."""
    width, height = figure.get_size_inches() * 72
    whole = f'viewBox="0 -38 {width:g} {height + 38:g}"'
    text = re.sub(r'viewBox="[^"]*"', whole, markup(figure, name), count=1)
    style = f"<style>{page_colours()}svg {{ background: var(--paper); }}</style>"
    head = "".join(
        f'<text x="8" y="{y}" font-family="DejaVu Sans, sans-serif" font-size="{size}" '
        f'fill="var(--{colour})">{escape(said if len(said) <= 60 else said[:60] + "…")}</text>'
        for said, y, size, colour in ((title, -22, 11, "ink"), (note, -8, 9, "muted"))
    )
    end = text.index(">") + 1
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text[:end]}{style}{head}{text[end:]}\n'


def _rows(
    labels: Sequence[str], heights: Sequence[float], series: Sequence[str]
) -> tuple[Figure, Axes]:
    """Axes with a labelled row for each label, `heights` in inches, the first on top."""
    labels = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…" for name in labels]
    left = 0.12 + _LETTER * max(map(len, labels))
    columns = max(1, int((WIDTH - 0.2) / (0.42 + _LETTER * max(map(len, series), default=1))))
    head = 0.04 if len(series) < 2 else 0.06 + 0.2 * math.ceil(len(series) / columns)
    height = sum(heights) + head + 0.42
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes(
        (left / WIDTH, 0.42 / height, 1 - (left + 0.12) / WIDTH, sum(heights) / height)
    )
    ends = [sum(heights[: k + 1]) for k in range(len(heights))]
    centres = [end - high / 2 for end, high in zip(ends, heights, strict=True)]
    axes.set_yticks(centres, list(labels), color=PALETTE["ink"], fontsize=9.5)
    axes.set_ylim(ends[-1], 0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    if len(series) > 1:
        fills = colours(series)
        for name in series:
            axes.plot([], [], linestyle="", marker="s", markersize=6, color=fills[name], label=name)
        _legend(figure, axes, columns, height)
    return figure, axes


def _legend(figure: Figure, axes: Axes, columns: int, height: float) -> None:
    axes.legend(
        loc="upper left", bbox_to_anchor=(0.005, 1 - 0.02 / height), ncols=columns,
        bbox_transform=figure.transFigure, fontsize=9, borderaxespad=0, handletextpad=0.4,
        columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip


def _finish(axes: Axes, unit: str, mark: float | None) -> None:
    if mark is not None:
        axes.axvline(mark, color=PALETTE["ink"], linewidth=1.1, linestyle=(0, (2, 2)))
    axes.set_xlabel(unit, fontsize=9, loc="right")


def _decades(axis: Axis, parts: tuple[float, ...] = (1.0,)) -> None:
    """Ticks at `parts` of powers of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(base=10, subs=parts, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _spread(value: Quantity) -> Spread:
    return value if isinstance(value, Spread) else Spread(value, value, value)
