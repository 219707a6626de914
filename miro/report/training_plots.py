"""The plots of a training run, from the lines of its metrics file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from miro.report import plots
from miro.report.render import plot
from miro.training.metrics_log import read_metrics

Kind = tuple[str, str, str, bool]
LEARNING: tuple[Kind, ...] = (
    ("loss", "Loss", "velocity error, mean of each report", True),
    ("gradient_norm", "Gradient norm", "before clipping", True),
    ("images_per_second", "Throughput", "images per second", False),
)


def training_plots(
    training: Mapping[str, list[dict[str, Any]]], kinds: Iterable[Kind] = LEARNING
) -> list[dict[str, Any]]:
    """What the reports say of each kind over images, a line per model; nothing where they do not.

    kinds: key of the reports, title, note, and whether it is drawn in logarithms.
    """
    found = []
    for key, title, note, log in kinds:
        lines = {}
        for model, reports in training.items():
            known = [line for line in reports if isinstance(line.get(key), int | float)]
            if known:
                lines[model] = [r["images"] for r in known], [float(r[key]) for r in known]
        if lines:
            figure = plots.training_lines(lines, log=log)
            found.append({"title": title, "note": note, "plot": plot(figure, f"training {key}")})
    return found


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file; ValueError names it and how to get it."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from None


def read_training(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The lines of a metrics file; ValueError if it is absent or holds something else."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {remedy}")
    lines = read_metrics(path)
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not isinstance(line.get("images"), int):
            raise ValueError(f"{path}: line {number} says nothing of 'images'; {remedy}")
    return lines
