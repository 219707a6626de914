"""The demo's report: one HTML file with every figure, plot and picture in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from miro.report import plots
from miro.report.render import data_uri, label, number, plot, write_page
from miro.report.training_plots import training_plots
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

# What each metric is, for readers who meet it here first.
METRIC_NOTES = {
    "colourfulness": "Spread and strength of the colours (Hasler and Süsstrunk 2003).",
    "sharpness": "How far edges stand out from noise, as the logarithm of a ratio.",
    "alignment": "How far the picture bears out the caption, by an open_clip model fitted here.",
    VERIFIER: "Share of pictures that show all that the prompt says. No model was trained on it.",
}
_WIDE, _NARROW = 960, 580  # CSS pixels a grid may take beside its labels, by width of the screen


def write_demo_report(folder: Path) -> Path:
    """Write folder/report.html from what `miro demo` left in the folder, and return its path.

    Raises:
        ValueError: results.json is missing, or a file is broken; names it and what to run.
    """
    demo = read_demo(Path(folder))
    panels = _score_panels(demo)
    return write_page(
        Path(folder) / "report.html",
        "demo.html",
        [Path(__file__).parent],
        demo=demo,
        looks=plots.looks(demo.models),
        notes=METRIC_NOTES,
        factors={s: _factors(demo, s) for s in demo.crossing_factor},
        verdicts=[v for s in demo.final if (v := _verdict(demo, s)) is not None],
        curves=panels,
        curve_models=list(dict.fromkeys(model for row in panels for model in row["models"])),
        radars=_radars(demo),
        table=_final_table(demo),
        categories=_category_plots(demo),
        grids=[_sheet(grid) for grid in demo.grids],
        training=training_plots(demo.training),
        pixels=demo.grids[0].cell if demo.grids else None,
    )


def factor_text(factor: float | None, at_least: bool) -> str:
    """A crossing factor as it is written everywhere: 1.25×, 4.0×, ≥ 6.7×, or none."""
    if not factor or not math.isfinite(factor):
        return "none"
    return f"{'≥ ' if at_least else ''}{factor:.{2 if factor < 2 else 1}f}×"


def _factors(demo: DemoResults, setting: str) -> dict[str, str]:
    """Metric -> factor as text, in the order of the metrics."""
    given = demo.crossing_factor[setting]
    texts = {}
    for metric in (m for m in demo.metrics if m in given):
        crossing = _crossing(demo, setting, metric)
        texts[metric] = factor_text(given[metric], crossing is not None and crossing.at_least)
    return texts


def _crossing(demo: DemoResults, setting: str, metric: str) -> Crossing | None:
    factor = demo.crossing_factor.get(setting, {}).get(metric)
    curves = demo.curves
    if curves is None or metric not in curves.values.get(setting, {}).get(BASELINE, {}):
        return None
    return curves.crossing(setting, metric, factor)


def _verdict(demo: DemoResults, setting: str) -> dict[str, Any] | None:
    """What the verifier says of MIRO against the baseline, and how sure that is."""
    scores, errors = demo.final[setting], demo.standard_error.get(setting, {})
    if any(VERIFIER not in scores.get(model, {}) for model in (BASELINE, MIRO)):
        return None
    miro, baseline = scores[MIRO][VERIFIER], scores[BASELINE][VERIFIER]
    if not (math.isfinite(miro) and math.isfinite(baseline)):
        return None
    factors = demo.crossing_factor.get(setting, {})
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
        "sure": abs(miro - baseline) > 2 * error,  # False where the error is not known
        "crossing": _crossing(demo, setting, VERIFIER),
        "never": VERIFIER in factors and not factors[VERIFIER],
    }


def _score_panels(demo: DemoResults) -> list[dict[str, Any]]:
    """The training curves: per setting with both models, a plot for each metric."""
    found = []
    for setting, scores, metrics in _compared(demo):
        assert demo.curves is not None
        panels = []
        for metric in metrics:
            crossing = _crossing(demo, setting, metric)
            figure = plots.score_curves(**_panel_arguments(demo.curves, setting, metric, crossing))
            factor = demo.crossing_factor.get(setting, {}).get(metric)
            panels.append(
                {
                    "metric": metric,
                    "plot": plot(figure, f"curve {setting} {metric}"),
                    "factor": factor_text(factor, crossing is not None and crossing.at_least),
                }
            )
        found.append({"setting": setting, "models": list(scores), "panels": panels})
    return found


def _compared(
    demo: DemoResults,
) -> Iterator[tuple[str, dict[str, dict[str, list[float]]], list[str]]]:
    """(setting, scores, metrics) of the settings in which both models have curves."""
    for setting, scores in (demo.curves.values if demo.curves else {}).items():
        if BASELINE in scores and MIRO in scores:
            yield setting, scores, [m for m in demo.metrics if m in scores[MIRO]]


def _panel_arguments(
    curves: Curves, setting: str, metric: str, crossing: Crossing | None
) -> dict[str, Any]:
    """The arguments of `plots.score_curves`, with one vertical axis in every setting."""
    shown = [models for models in curves.values.values() if BASELINE in models]
    every = [scores[metric] for models in shown for scores in models.values() if metric in scores]
    models = curves.values[setting]
    return {
        "marks": curves.marks,
        "scores": {model: scores[metric] for model, scores in models.items() if metric in scores},
        "crossing": None if crossing is None else (crossing.images, crossing.score),
        "limits": plots.value_range(every),
    }


def curve_sheet_panels(demo: DemoResults) -> list[list[dict[str, Any]]]:
    """The same panels for one picture, with titles that hold the factor."""
    rows = []
    for setting, _, metrics in _compared(demo):
        assert demo.curves is not None
        row = []
        for metric in metrics:
            crossing = _crossing(demo, setting, metric)
            factor = demo.crossing_factor.get(setting, {}).get(metric)
            text = factor_text(factor, crossing is not None and crossing.at_least)
            title = f"{label(metric)}, {label(setting).lower()}: {text}"
            row.append({"title": title, **_panel_arguments(demo.curves, setting, metric, crossing)})
        rows.append(row)
    return rows


def _radars(demo: DemoResults) -> list[dict[str, Any]]:
    """A radar per setting that has several models; an axis has one scale in all of them."""
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
        figure = plots.radar([label(metric) for metric in spans], rims, shares)
        radars.append({"setting": setting, "plot": plot(figure, f"radar {setting}")})
    return radars


def _final_table(demo: DemoResults) -> list[dict[str, Any]]:
    """Settings with a row per model and a cell per metric; the best of a setting is marked."""
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
        figure = plots.category_dots([label(category) for category in categories], shares)
        found.append({"setting": setting, "plot": plot(figure, f"categories {setting}")})
    return found


def _sheet(grid: Grid) -> dict[str, Any]:
    """A grid for the template, with the whole numbers by which its pixels are enlarged."""
    width = len(grid.columns) * grid.cell
    wide, narrow = (max(1, min(4, room // width)) for room in (_WIDE, _NARROW))
    return {"grid": grid, "wide": wide, "narrow": narrow, "source": data_uri(grid.picture)}
