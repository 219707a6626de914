"""What a demo folder holds, read and checked once, so that the page only has to lay it out.

    results.json  the figures          curves.json  scores along training
    grids.json, grids/*.png            <model>/metrics.jsonl  what each training reported

Only results.json must exist. Whatever else is absent is absent on the page; what exists and cannot
be read is an error that names the file.
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
_AGAIN = "delete it and run `miro demo` again"


@dataclass(frozen=True)
class Crossing:
    """Where MIRO rises above the baseline's final score for good."""

    images: float
    score: float  # the baseline's, at the end
    at_least: bool  # MIRO was above it from the first point on, so the factor is a lower bound


@dataclass(frozen=True)
class Curves:
    """Scores of the models at `marks` images, from `start` on."""

    marks: list[int]
    start: int
    values: dict[str, dict[str, dict[str, list[float]]]]  # setting -> model -> metric -> per mark

    @property
    def total(self) -> int:
        """Images each model was trained on."""
        return self.marks[-1]

    def crossing(self, setting: str, metric: str, factor: float | None) -> Crossing | None:
        """The point that a crossing factor stands for, or None where there is none."""
        if not factor or not math.isfinite(factor):
            return None
        images = self.total / factor
        # The factor went through JSON: the first mark is met up to rounding.
        at_least = images <= self.marks[0] * (1 + 1e-6)
        return Crossing(images, self.values[setting][BASELINE][metric][-1], at_least)


@dataclass(frozen=True)
class Grid:
    """A contact sheet without text, and the text that belongs around it."""

    title: str
    caption: str
    rows: list[str]
    columns: list[str]
    picture: Path
    cell: int  # pixels of a side of a cell in the picture


@dataclass(frozen=True)
class DemoResults:
    """All that the page shows."""

    final: Scores
    standard_error: Scores
    verifier_by_category: Scores
    crossing_factor: dict[str, dict[str, float | None]]  # setting -> metric -> factor
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
        """The models in the order of the results, the baseline and MIRO first."""
        found = dict.fromkeys(model for rows in self.final.values() for model in rows)
        first = [model for model in (BASELINE, MIRO) if model in found]
        return first + [model for model in found if model not in first]

    @property
    def metrics(self) -> list[str]:
        """The metrics in the order of the results, the verifier last: it is the judge of all."""
        rows = [row for models in self.final.values() for row in models.values()]
        found = dict.fromkeys(metric for row in rows for metric in row)
        return [m for m in found if m != VERIFIER] + [m for m in found if m == VERIFIER]


def read_demo(folder: Path) -> DemoResults:
    """What `miro demo` left in `folder`; ValueError names a file that is missing or broken."""
    folder = Path(folder)
    path = folder / "results.json"
    record = read_json(path, "run `miro demo` to its end")
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a JSON object; {_AGAIN}")
    if not isinstance(record.get("final"), dict) or not record["final"]:
        raise ValueError(f"{path}: the field 'final' is missing or empty; {_AGAIN}")
    final: Scores = _numbers(record["final"], 3, path, "final")
    trained = dict.fromkeys(model for rows in final.values() for model in rows)
    logs = {model: folder / model / "metrics.jsonl" for model in trained}

    def field(name: str, depth: int) -> Any:
        return _numbers(record.get(name) or {}, depth, path, name)

    factors = record.get("crossing_factor") or {}
    _numbers(factors, 2, path, "crossing_factor")
    rate, wall = record.get("images_per_second"), record.get("wall_seconds")
    return DemoResults(
        final=final,
        standard_error=field("standard_error", 3),
        verifier_by_category=field("verifier_by_category", 3),
        crossing_factor=factors,
        diversity=field("diversity", 1),
        seconds=field("seconds", 1),
        wall_seconds=None if wall is None else _numbers(wall, 0, path, "wall_seconds"),
        images_per_second=None if rate is None else _numbers(rate, 0, path, "images_per_second"),
        settings=_table(record.get("settings") or {}, path, "settings"),
        versions=_table(record.get("versions") or {}, path, "versions"),
        seed=record.get("seed"),
        quick=bool(record.get("quick", False)),
        curves=_curves(folder / "curves.json"),
        grids=_grids(folder / "grids.json"),
        training={m: read_training(p, _AGAIN) for m, p in logs.items() if p.is_file()},
    )


def _table(value: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {where} is {value!r}, not an object; {_AGAIN}")
    return value


def _numbers(value: Any, depth: int, path: Path, where: str) -> Any:
    """`depth` nested objects with numbers inside, null read as NaN."""
    if depth:
        items = _table(value, path, where).items()
        return {key: _numbers(v, depth - 1, path, f"{where}.{key}") for key, v in items}
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: {where} is {value!r}, not a number; {_AGAIN}")
    return float(value)


def _curves(path: Path) -> Curves | None:
    if not path.exists():
        return None
    record = _table(read_json(path, _AGAIN), path, "the whole file")
    marks, start = record.get("marks"), record.get("start", 0)
    if not isinstance(marks, list) or not marks or sorted(marks) != marks:
        raise ValueError(f"{path}: marks is {marks!r}, not a rising list; {_AGAIN}")
    if start > marks[-1]:
        raise ValueError(f"{path}: start is {start}, after the last of the marks; {_AGAIN}")
    skipped = sum(mark < start for mark in marks)

    def series(values: Any, where: str) -> list[float]:
        if not isinstance(values, list) or len(values) != len(marks):
            raise ValueError(f"{path}: {where} has not one value for each of {len(marks)} marks")
        return [_numbers(value, 0, path, where) for value in values[skipped:]]

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
    return Curves(marks[skipped:], start, values)


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
            picture=path.parent / record["picture"],
            cell=int(record["cell"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a grid lacks or misstates {error}; {_AGAIN}") from None
    try:
        with Image.open(grid.picture) as picture:
            size = picture.size
    except FileNotFoundError:
        raise ValueError(
            f"{grid.picture}: no such file, but {path.name} lists it; run `miro demo` again"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(f"{grid.picture}: not a picture; {_AGAIN}") from None
    expected = len(grid.columns) * grid.cell, len(grid.rows) * grid.cell
    if size != expected:
        # Labels are laid out around the picture: on another size they would name the wrong cells.
        raise ValueError(
            f"{grid.picture}: {size[0]} x {size[1]} pixels, but {path.name} says {len(grid.rows)} "
            f"rows and {len(grid.columns)} columns of {grid.cell} pixels; {_AGAIN}"
        )
    return grid
