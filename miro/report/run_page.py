"""The report of a training run: one HTML file from the files of its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miro.report import plots
from miro.report.render import data_uri, label, plot, write_page
from miro.report.training_plots import (
    TRAINING_METRICS,
    MetricPlot,
    read_json,
    read_training,
    training_plots,
)
from miro.training.checkpoint import RunFolder

_MAX_SAMPLES = 24  # images on the page, which are inlined
_DEVICE_METRICS = (
    MetricPlot("mfu", "MFU", "model FLOPs utilization, a fraction of the peak"),
    MetricPlot("data_wait", "Data wait", "fraction of the time"),
    MetricPlot("memory/allocated_gib", "GPU memory", "GiB allocated, maximum over GPUs"),
    MetricPlot("memory/resident_gib", "Host memory", "GiB resident, of one process"),
    MetricPlot("gpu/power_watts", "Power", "watts of the first GPU"),
    MetricPlot("gpu/sm_clock_mhz", "SM clock", "MHz of the first GPU"),
    MetricPlot("gpu/temperature_celsius", "Temperature", "°C of the first GPU"),
)


def write_run_report(run: Path) -> Path:
    """Write RUN/report.html.

    Returns:
        Its path.

    Raises:
        ValueError: config.json or metrics.jsonl is missing or broken.
    """
    folder = RunFolder(run)
    remedy = f"{folder.root} is not the folder of a training run; make one with `miro train`"
    config = read_json(folder.config, remedy)
    if not isinstance(config, dict):
        raise ValueError(f"{folder.config}: not a JSON object; {remedy}")
    records = read_training(folder.metrics, remedy)
    evaluation = _optional(folder.root / "evaluation.json", "run `miro evaluate` again")
    samples = sorted((folder.root / "samples").glob("*.png"))
    return write_page(
        folder.root / "report.html",
        "run.html",
        name=folder.root.resolve().name,
        records=records,
        plots=training_plots({"miro": records}, (*TRAINING_METRICS, *_DEVICE_METRICS)),
        loss_plots=_loss_plots(records),
        groups=_groups(config),
        versions=_optional(folder.versions, "delete it"),
        evaluation=[] if evaluation is None else _flat(evaluation),
        weights=[images for images, _ in folder.weights_written()],
        total=config.get("images"),
        samples=[{"name": p.stem, "source": data_uri(p)} for p in samples[-_MAX_SAMPLES:]],
        samples_left_out=max(0, len(samples) - _MAX_SAMPLES),
    )


def _loss_plots(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The loss by timestep at the start, middle and end, and by the bins of each reward."""
    found = []

    def add(title: str, note: str, lines: Mapping[str, Any], x_label: str) -> None:
        figure = plots.line_plot(lines, log=True, x_label=x_label, legend=True)
        found.append({"title": title, "note": note, "plot": plot(figure, title)})

    by_time = [(record["images"], _with_prefix("loss_by_t/", record)) for record in records]
    by_time = [(images, losses) for images, losses in by_time if losses]
    if by_time:
        lines = {
            f"{plots.format_count(images)} images": ([float(t) for t in losses], [*losses.values()])
            for images, losses in (by_time[0], by_time[len(by_time) // 2], by_time[-1])
        }
        add("Loss by timestep", "at three points of training", lines, "t, from data to noise")
    thirds: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for record in records:
        for name, loss in _with_prefix("loss_by_reward/", record).items():
            reward, _, third = name.rpartition("/")
            images, losses = thirds.setdefault(reward, {}).setdefault(third, ([], []))
            images.append(record["images"])
            losses.append(loss)
    for reward, lines in thirds.items():
        add(f"Loss by {label(reward).lower()}", "by thirds of its bins", lines, "images")
    return found


def _with_prefix(prefix: str, record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers whose names have the prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in record.items()
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
    """The configuration by section: top-level values first, then each nested object."""
    top = [(key, value) for key, value in config.items() if not isinstance(value, dict)]
    nested = {key: _flat(value) for key, value in config.items() if isinstance(value, dict)}
    return {"run": top, **nested}


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested objects as (dotted name, value) pairs."""
    pairs: list[tuple[str, Any]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs
