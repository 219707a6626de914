"""The report of any training run: one HTML file from what its folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miro.checkpoint import RunFolder
from miro.report.page import training_plots
from miro.report.render import data_uri, write_page
from miro.report.results import read_json, read_training

_MOST_SAMPLES = 24  # pictures in one page; more would make it slow to open


def write_run_report(run: Path) -> Path:
    """Write run/report.html and return its path.

    Raises:
        ValueError: config.json or metrics.jsonl is missing or broken; names it and what to run.
    """
    folder = RunFolder(run)
    remedy = f"{folder.root} is not the folder of a training run; make one with `miro train`"
    config = read_json(folder.config, remedy)
    if not isinstance(config, dict):
        raise ValueError(f"{folder.config}: not a JSON object; {remedy}")
    reports = read_training(folder.metrics, remedy)
    evaluation = _optional(folder.root / "evaluation.json", "run `miro evaluate` again")
    samples = sorted((folder.root / "samples").glob("*.png"))
    return write_page(
        folder.root / "report.html",
        "run.html",
        name=folder.root.resolve().name,
        reports=reports,
        plots=training_plots({"miro": reports}),
        groups=_groups(config),
        versions=_optional(folder.versions, "delete it"),
        evaluation=[] if evaluation is None else _flat(evaluation),
        weights=[images for images, _ in folder.weights_written()],
        total=config.get("images"),
        samples=[{"name": p.stem, "source": data_uri(p)} for p in samples[-_MOST_SAMPLES:]],
        samples_left_out=max(0, len(samples) - _MOST_SAMPLES),
    )


def _optional(path: Path, remedy: str) -> dict[str, Any] | None:
    """A JSON object, or None where the file does not exist."""
    if not path.exists():
        return None
    record = read_json(path, remedy)
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a JSON object; {remedy}")
    return record


def _groups(config: Mapping[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    """The configuration by part: what stands at the top first, then each nested record."""
    top = [(key, value) for key, value in config.items() if not isinstance(value, dict)]
    nested = {key: _flat(value) for key, value in config.items() if isinstance(value, dict)}
    return {"run": top, **nested}


def _flat(record: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    """Nested records as (dotted name, value) pairs."""
    pairs: list[tuple[str, Any]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{where}{key}.")
        else:
            pairs.append((f"{where}{key}", value))
    return pairs
