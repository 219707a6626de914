"""The content of a demo folder, validated, for its report.

    results.json  evaluations          curves.json  scores along training
    grids.json, grids/*.png            <model>/metrics.jsonl  metrics of each training

Only results.json is required; sections without data are left out. A file that exists and is invalid
is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from miro.report.training_plots import read_json, read_training

Scores = dict[str, dict[str, dict[str, float]]]  # setting -> model -> metric -> score, NaN unknown
BASELINE, MIRO, VERIFIER = "baseline", "miro", "verifier"
_RUN = "run `python -m openmoji demo` to its end"
_AGAIN = "delete it and run `python -m openmoji demo` again"


@dataclass(frozen=True)
class Crossing:
    """The point from which MIRO stays above the baseline's final score.

    Attributes:
        images: MIRO's training images.
        score: The baseline's final score.
        at_least: Whether MIRO is above from the first checkpoint on, so that the data efficiency is
            a lower bound.
    """

    images: float
    score: float
    at_least: bool


@dataclass(frozen=True)
class Curves:
    """Scores at the checkpoints from `start` on: setting -> model -> metric -> per checkpoint."""

    checkpoints: list[int]
    start: int
    values: dict[str, dict[str, dict[str, list[float]]]]

    @property
    def total(self) -> int:
        """Training images of each model."""
        return self.checkpoints[-1]

    def crossing(self, setting: str, metric: str, efficiency: float | None) -> Crossing | None:
        """The crossing of a data efficiency; None if there is none."""
        if not efficiency or not math.isfinite(efficiency):
            return None
        images = self.total / efficiency
        # A tolerance, since the efficiency was rounded in JSON.
        at_least = images <= self.checkpoints[0] * (1 + 1e-6)
        return Crossing(images, self.values[setting][BASELINE][metric][-1], at_least)


@dataclass(frozen=True)
class Grid:
    """A grid of images without text, and its labels; `cell` is the side of an image in pixels."""

    title: str
    caption: str
    rows: list[str]
    columns: list[str]
    image: Path
    cell: int


@dataclass(frozen=True)
class DemoResults:
    """All content of the report."""

    final: Scores
    standard_error: Scores
    verifier_by_category: Scores
    data_efficiency: dict[str, dict[str, float | None]]  # setting -> metric
    diversity: dict[str, float]
    seconds: dict[str, float]  # of each stage; stages overlap
    wall_seconds: float | None
    images_per_second: float | None
    settings: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    seed: int | None
    quick: bool
    curves: Curves | None
    grids: list[Grid]
    training: dict[str, list[dict[str, Any]]]  # model -> lines of its metrics.jsonl

    @property
    def models(self) -> list[str]:
        """The models, the baseline and MIRO first."""
        found = dict.fromkeys(model for rows in self.final.values() for model in rows)
        first = [model for model in (BASELINE, MIRO) if model in found]
        return first + [model for model in found if model not in first]

    @property
    def metrics(self) -> list[str]:
        """The metrics, the verifier last."""
        rows = [row for models in self.final.values() for row in models.values()]
        found = dict.fromkeys(metric for row in rows for metric in row)
        return sorted(found, key=lambda metric: metric == VERIFIER)

    def crossing(self, setting: str, metric: str) -> Crossing | None:
        """Where MIRO passes the baseline's final score; None if it does not or is unknown."""
        efficiency = self.data_efficiency.get(setting, {}).get(metric)
        if self.curves is None or metric not in self.curves.values.get(setting, {}).get(
            BASELINE, {}
        ):
            return None
        return self.curves.crossing(setting, metric, efficiency)


def read_demo(folder: Path) -> DemoResults:
    """Read a demo folder; ValueError if a file is missing or invalid."""
    path = folder / "results.json"
    record = read_json(path, _RUN)
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a JSON object; {_AGAIN}")
    if not isinstance(record.get("final"), dict) or not record["final"]:
        raise ValueError(f"{path}: the field 'final' is missing or empty; {_AGAIN}")
    final: Scores = _numbers(record["final"], 3, path, "final")
    models = dict.fromkeys(model for rows in final.values() for model in rows)
    metrics = {model: folder / model / "metrics.jsonl" for model in models}

    def field(name: str, depth: int) -> Any:
        if depth == 0:
            value = record.get(name)
            return None if value is None else _numbers(value, 0, path, name)
        return _numbers(record.get(name) or {}, depth, path, name)

    field("data_efficiency", 2)
    return DemoResults(
        final=final,
        standard_error=field("standard_error", 3),
        verifier_by_category=field("verifier_by_category", 3),
        data_efficiency=record.get("data_efficiency") or {},  # null stays None
        diversity=field("diversity", 1),
        seconds=field("seconds", 1),
        wall_seconds=field("wall_seconds", 0),
        images_per_second=field("images_per_second", 0),
        settings=_table(record.get("settings") or {}, path, "settings"),
        versions=_table(record.get("versions") or {}, path, "versions"),
        seed=record.get("seed"),
        quick=bool(record.get("quick", False)),
        curves=_curves(folder / "curves.json"),
        grids=_grids(folder / "grids.json"),
        training={m: read_training(p, _AGAIN) for m, p in metrics.items() if p.is_file()},
    )


def _table(value: Any, path: Path, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name} is {value!r}, not an object; {_AGAIN}")
    return value


def _numbers(value: Any, depth: int, path: Path, name: str) -> Any:
    """Numbers in `depth` nested objects, with null as NaN."""
    if depth:
        items = _table(value, path, name).items()
        return {key: _numbers(v, depth - 1, path, f"{name}.{key}") for key, v in items}
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: {name} is {value!r}, not a number; {_AGAIN}")
    return float(value)


def _curves(path: Path) -> Curves | None:
    if not path.exists():
        return None
    record = _table(read_json(path, _AGAIN), path, "the whole file")
    checkpoints, start = record.get("checkpoints"), record.get("start", 0)
    if not isinstance(checkpoints, list) or not checkpoints or sorted(checkpoints) != checkpoints:
        raise ValueError(f"{path}: checkpoints is {checkpoints!r}, not an ascending list; {_AGAIN}")
    if start > checkpoints[-1]:
        raise ValueError(f"{path}: start is {start}, after the last checkpoint; {_AGAIN}")
    skipped = sum(images < start for images in checkpoints)

    def series(values: Any, name: str) -> list[float]:
        if not isinstance(values, list) or len(values) != len(checkpoints):
            raise ValueError(
                f"{path}: {name} has not one value per checkpoint, {len(checkpoints)}; {_AGAIN}"
            )
        return [_numbers(value, 0, path, name) for value in values[skipped:]]

    settings = {key: _table(v, path, key) for key, v in record.items() if isinstance(v, dict)}
    values = {
        setting: {
            model: {
                metric: series(points, f"{setting}.{model}.{metric}")
                for metric, points in _table(by_metric, path, f"{setting}.{model}").items()
            }
            for model, by_metric in models.items()
        }
        for setting, models in settings.items()
    }
    return Curves(checkpoints[skipped:], start, values)


def _grids(path: Path) -> list[Grid]:
    if not path.exists():
        return []
    records = read_json(path, _AGAIN)
    if not isinstance(records, list):
        raise ValueError(f"{path}: not a list of grids; {_AGAIN}")
    return [_grid(record, path) for record in records]


def _grid(record: Mapping[str, Any], path: Path) -> Grid:
    try:
        grid = Grid(
            title=record["title"],
            caption=record["caption"],
            rows=list(record["rows"]),
            columns=list(record["columns"]),
            image=path.parent / record["image"],
            cell=int(record["cell"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a grid has no or an invalid {error}; {_AGAIN}") from None
    try:
        with Image.open(grid.image) as image:
            size = image.size
    except FileNotFoundError:
        raise ValueError(f"{grid.image}: no such file, but {path.name} lists it; {_RUN}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{grid.image}: not an image; {_AGAIN}") from None
    expected = len(grid.columns) * grid.cell, len(grid.rows) * grid.cell
    if size != expected:
        # The labels would be next to the wrong cells.
        raise ValueError(
            f"{grid.image}: {size[0]} x {size[1]} pixels, but {path.name} has {len(grid.rows)} "
            f"rows and {len(grid.columns)} columns of {grid.cell} pixels; {_AGAIN}"
        )
    return grid
