"""The report of any training run: one HTML file from what its folder holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miro.report import plots
from miro.report.render import data_uri, label, plot, write_page
from miro.report.training_plots import LEARNING, Kind, read_json, read_training, training_plots
from miro.training.checkpoint import RunFolder

_MOST_SAMPLES = 24  # pictures in one page; more would make it slow to open
_MACHINE: tuple[Kind, ...] = (
    ("mfu", "MFU", "useful FLOPs, as a share of the peak", False),
    ("data_wait", "Data wait", "share of the time", False),
    ("memory/allocated_gib", "Memory", "GiB allocated on a GPU, at most", False),
    ("memory/resident_gib", "Memory", "GiB of a process", False),
    ("gpu/power_watts", "Power", "watts of the first GPU", False),
    ("gpu/sm_clock_mhz", "Clock", "MHz of the first GPU", False),
    ("gpu/temperature_celsius", "Temperature", "°C of the first GPU", False),
)


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
        plots=training_plots({"miro": reports}, (*LEARNING, *_MACHINE)),
        loss_plots=_loss_plots(reports),
        groups=_groups(config),
        versions=_optional(folder.versions, "delete it"),
        evaluation=[] if evaluation is None else _flat(evaluation),
        weights=[images for images, _ in folder.weights_written()],
        total=config.get("images"),
        samples=[{"name": p.stem, "source": data_uri(p)} for p in samples[-_MOST_SAMPLES:]],
        samples_left_out=max(0, len(samples) - _MOST_SAMPLES),
    )


def _loss_plots(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The loss by noise, of the first, middle and last report, and by the bins of each reward."""
    found = []

    def add(title: str, note: str, lines: Mapping[str, Any], across: str) -> None:
        figure = plots.training_lines(lines, log=True, across=across, named=True)
        found.append({"title": title, "note": note, "plot": plot(figure, title)})

    told = [(r["images"], _under("loss_by_t/", r)) for r in reports]
    told = [(images, at) for images, at in told if at]
    if told:
        lines = {
            f"{plots.thousands(images)} images": ([float(t) for t in at], list(at.values()))
            for images, at in (told[0], told[len(told) // 2], told[-1])
        }
        add("Loss by noise", "velocity error, three reports", lines, "t, from data to noise")
    thirds: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for report in reports:
        for name, loss in _under("loss_by_reward/", report).items():
            reward, _, third = name.rpartition("/")
            images, losses = thirds.setdefault(reward, {}).setdefault(third, ([], []))
            images.append(report["images"])
            losses.append(loss)
    for reward, lines in thirds.items():
        note = "velocity error, by thirds of its bins"
        add(f"Loss by {label(reward).lower()}", note, lines, "images")
    return found


def _under(prefix: str, report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in report.items()
        if name.startswith(prefix) and isinstance(value, int | float)
    }


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
