"""The demo's report: one HTML file with all results, plots and images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from miro.report.plots import line_styles
from miro.report.render import data_uri, label, number, plot, write_page
from miro.report.training_plots import training_plots
from openmoji.demo_plots import category_dots, radar, score_curves, value_range
from openmoji.page_data import (
    BASELINE,
    MIRO,
    VERIFIER,
    Crossing,
    Curves,
    DemoResults,
    Grid,
    read_demo,
)

METRIC_NOTES = {
    "colourfulness": "Spread and strength of the colors (Hasler and Süsstrunk 2003).",
    "sharpness": "Log ratio of edge strength to noise.",
    "alignment": "How well the image supports the caption, by an open_clip model fitted here.",
    VERIFIER: "Share of images that show all of the prompt. No model was trained on it.",
}
_WIDE, _NARROW = 960, 580  # CSS pixels of a grid beside its labels, by screen width


def write_demo_report(folder: Path) -> Path:
    """Write FOLDER/report.html from a demo folder.

    Returns:
        Its path.

    Raises:
        ValueError: results.json is missing, or a file is invalid.
    """
    demo = read_demo(folder)
    curves = _curves(demo)
    return write_page(
        folder / "report.html",
        "demo.html",
        folders=[Path(__file__).parent],
        demo=demo,
        styles=line_styles(demo.models),
        notes=METRIC_NOTES,
        efficiencies={
            setting: {m: efficiency_text(demo, setting, m) for m in demo.metrics if m in by_metric}
            for setting, by_metric in demo.data_efficiency.items()
        },
        comparisons=[c for s in demo.final if (c := _comparison(demo, s)) is not None],
        curves=curves,
        curve_models=list(dict.fromkeys(model for row in curves for model in row["models"])),
        radars=_radars(demo),
        table=_final_table(demo),
        categories=_category_plots(demo),
        grids=[_grid(grid) for grid in demo.grids],
        training=training_plots(demo.training),
        pixels=demo.grids[0].cell if demo.grids else None,
    )


def efficiency_text(demo: DemoResults, setting: str, metric: str) -> str:
    """A data efficiency as text: 1.25×, 4.0×, ≥ 6.7×, or none."""
    efficiency = demo.data_efficiency.get(setting, {}).get(metric)
    if not efficiency or not math.isfinite(efficiency):
        return "none"
    crossing = demo.crossing(setting, metric)
    at_least = crossing is not None and crossing.at_least
    return f"{'≥ ' if at_least else ''}{efficiency:.{2 if efficiency < 2 else 1}f}×"


def _comparison(demo: DemoResults, setting: str) -> dict[str, Any] | None:
    """MIRO against the baseline by the verifier, with the standard error of the difference."""
    scores, errors = demo.final[setting], demo.standard_error.get(setting, {})
    miro, baseline = (scores.get(m, {}).get(VERIFIER, math.nan) for m in (MIRO, BASELINE))
    if not (math.isfinite(miro) and math.isfinite(baseline)):
        return None
    efficiencies = demo.data_efficiency.get(setting, {})
    parts = [errors.get(model, {}).get(VERIFIER, math.nan) for model in (BASELINE, MIRO)]
    error = math.hypot(*parts)
    return {
        "setting": setting,
        "miro": miro,
        "baseline": baseline,
        "others": {
            m: row[VERIFIER]
            for m, row in scores.items()
            if m not in (BASELINE, MIRO) and VERIFIER in row
        },
        "error": error,
        "significant": abs(miro - baseline) > 2 * error,  # False if the error is NaN
        "crossing": demo.crossing(setting, VERIFIER),
        "never": VERIFIER in efficiencies and not efficiencies[VERIFIER],
    }


def _curves(demo: DemoResults) -> list[dict[str, Any]]:
    """Per setting with both models, a plot of each metric along training."""
    found = []
    for setting, curves, metrics in _compared(demo):
        panels = []
        for metric in metrics:
            crossing = demo.crossing(setting, metric)
            figure = score_curves(**_panel(curves, setting, metric, crossing))
            panels.append(
                {
                    "metric": metric,
                    "plot": plot(figure, f"curve {setting} {metric}"),
                    "efficiency": efficiency_text(demo, setting, metric),
                }
            )
        found.append({"setting": setting, "models": list(curves.values[setting]), "panels": panels})
    return found


def _compared(demo: DemoResults) -> Iterator[tuple[str, Curves, list[str]]]:
    """(setting, curves, metrics) of the settings with curves of both models."""
    for setting, scores in (demo.curves.values if demo.curves else {}).items():
        if demo.curves and BASELINE in scores and MIRO in scores:
            yield setting, demo.curves, [m for m in demo.metrics if m in scores[MIRO]]


def _panel(curves: Curves, setting: str, metric: str, crossing: Crossing | None) -> dict[str, Any]:
    """The arguments of `score_curves`; the limits are those of all settings."""
    shown = [models for models in curves.values.values() if BASELINE in models]
    every = [scores[metric] for models in shown for scores in models.values() if metric in scores]
    models = curves.values[setting]
    return {
        "checkpoints": curves.checkpoints,
        "scores": {model: scores[metric] for model, scores in models.items() if metric in scores},
        "crossing": None if crossing is None else (crossing.images, crossing.score),
        "limits": value_range(every),
    }


def curve_sheet_panels(demo: DemoResults) -> list[list[dict[str, Any]]]:
    """The panels of `curves_sheet`, a row per setting, with the data efficiency in the titles."""
    return [
        [
            {
                "title": f"{label(metric)}, {label(setting).lower()}: "
                f"{efficiency_text(demo, setting, metric)}",
                **_panel(curves, setting, metric, demo.crossing(setting, metric)),
            }
            for metric in metrics
        ]
        for setting, curves, metrics in _compared(demo)
    ]


def _radars(demo: DemoResults) -> list[dict[str, Any]]:
    """A radar chart per setting with several models, all with the same axes."""
    compared = {s: models for s, models in demo.final.items() if len(models) > 1}
    spans = {}
    for metric in demo.metrics:
        known = _known((row for rows in compared.values() for row in rows.values()), metric)
        if known and max(known) > min(0.0, *known):
            spans[metric] = min(0.0, *known), max(known)
    if len(spans) < 3:  # no outline encloses an area
        return []
    radars = []
    for setting, models in compared.items():
        shares = {
            model: [(row.get(m, math.nan) - low) / (high - low) for m, (low, high) in spans.items()]
            for model, row in models.items()
        }
        rims = [number(high) for _, high in spans.values()]
        figure = radar([label(metric) for metric in spans], rims, shares)
        radars.append({"setting": setting, "plot": plot(figure, f"radar {setting}")})
    return radars


def _final_table(demo: DemoResults) -> list[dict[str, Any]]:
    """Per setting a row per model and a cell per metric; the best of a setting is marked."""
    rows = [row for models in demo.final.values() for row in models.values()]
    # The largest score of a metric sets the decimals of its column.
    sizes = {metric: max(map(abs, _known(rows, metric)), default=0.0) for metric in demo.metrics}

    def cell(setting: str, model: str, metric: str) -> dict[str, Any]:
        models = demo.final[setting]
        value = models[model].get(metric, math.nan)
        error = demo.standard_error.get(setting, {}).get(model, {}).get(metric)
        return {
            "value": number(value, sizes[metric]),
            "error": None if error is None else number(error, sizes[metric]),
            "best": len(models) > 1 and value == max(_known(models.values(), metric), default=None),
        }

    return [
        {
            "setting": setting,
            "rows": [
                {"model": model, "cells": [cell(setting, model, m) for m in demo.metrics]}
                for model in demo.models
                if model in models
            ],
        }
        for setting, models in demo.final.items()
    ]


def _known(rows: Iterable[Mapping[str, float]], metric: str) -> list[float]:
    """The finite scores of a metric."""
    values = (row.get(metric, math.nan) for row in rows)
    return [value for value in values if math.isfinite(value)]


def _category_plots(demo: DemoResults) -> list[dict[str, Any]]:
    """The verifier's accuracy by category, per setting with several models."""
    found = []
    for setting, models in demo.verifier_by_category.items():
        if len(models) < 2:
            continue
        categories = list(dict.fromkeys(c for shares in models.values() for c in shares))
        shares = {
            model: [models[model].get(c, math.nan) for c in categories]
            for model in demo.models
            if model in models
        }
        figure = category_dots([label(category) for category in categories], shares)
        found.append({"setting": setting, "plot": plot(figure, f"categories {setting}")})
    return found


def _grid(grid: Grid) -> dict[str, Any]:
    """A grid with the integer factors by which it is enlarged on wide and narrow screens."""
    width = len(grid.columns) * grid.cell
    wide, narrow = (max(1, min(4, room // width)) for room in (_WIDE, _NARROW))
    return {"grid": grid, "wide": wide, "narrow": narrow, "source": data_uri(grid.image)}
