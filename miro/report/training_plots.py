"""Plots of a training run from its metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from miro.report import plots
from miro.report.render import plot
from miro.training.metrics_log import read_metrics


class MetricPlot(NamedTuple):
    """A metric to plot: key in metrics.jsonl, title, note, and whether the axis is logarithmic."""

    key: str
    title: str
    note: str
    log: bool = False


TRAINING_METRICS = (
    MetricPlot("loss", "Loss", "prediction error, mean over each interval", log=True),
    MetricPlot("gradient_norm", "Gradient norm", "before clipping", log=True),
    MetricPlot("images_per_second", "Throughput", "images per second"),
)


def training_plots(
    training: Mapping[str, list[dict[str, Any]]], metrics: Iterable[MetricPlot] = TRAINING_METRICS
) -> list[dict[str, Any]]:
    """Plot each metric over images, one line per model; metrics without values are left out.

    Args:
        training: The lines of metrics.jsonl by model.
        metrics: What to plot.

    Returns:
        {"title", "note", "plot"} per plot, for the templates.
    """
    found = []
    for key, title, note, log in metrics:
        lines = {}
        for model, records in training.items():
            known = [record for record in records if isinstance(record.get(key), int | float)]
            if known:
                lines[model] = [r["images"] for r in known], [float(r[key]) for r in known]
        if lines:
            figure = plots.line_plot(lines, log=log)
            found.append({"title": title, "note": note, "plot": plot(figure, f"training {key}")})
    return found


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file; ValueError with `remedy` if it is missing or broken."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from None


def read_training(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; ValueError with `remedy` if it is missing or broken."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {remedy}")
    lines = read_metrics(path)
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not isinstance(line.get("images"), int):
            raise ValueError(f"{path}: line {number} has no 'images'; {remedy}")
    return lines
