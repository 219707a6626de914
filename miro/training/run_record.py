"""What a run's folder records of the run: configuration, reward bins, versions, inference state."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any, Literal

from miro.conditioning import Bins
from miro.data.dataset_base import Dataset
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.utils.atomic_io import write_text
from miro.utils.serialize import differences, to_dict

# Fields that may change when a run is resumed: none of them changes a result.
FREE_TO_CHANGE = (
    "report_every",
    "peak_flops",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "on_failed_save",
    "data",
    "sharding",
    "threads",
)


def open_run(
    run: RunFolder,
    config: TrainConfig,
    bins: Bins,
    dataset: Dataset,
    resume: Literal["auto", "never"],
) -> None:
    """Record a new run, or check that the run to resume has the same configuration and scores.

    Raises:
        ValueError: the folder has another run, or has one and `resume` is never.
    """
    record = to_dict(config)
    if run.config.exists():
        if resume == "never":
            raise ValueError(f"{run.root} has a run already; choose another folder, or resume it")
        previous = json.loads(run.config.read_text())
        changed = differences(
            {k: v for k, v in record.items() if k not in FREE_TO_CHANGE},
            {k: v for k, v in previous.items() if k not in FREE_TO_CHANGE},
        )
        if changed:
            raise ValueError(
                f"{run.root} has a run of another configuration ({'; '.join(changed)}); choose "
                "another folder, or give the same configuration to resume"
            )
        if run.bins.read_text() != bins.to_json():
            raise ValueError(
                f"{run.root} was trained on other scores than {dataset.folder} has now; choose "
                "another folder"
            )
        return
    write_text(run.bins, bins.to_json())
    write_text(run.versions, json.dumps(_versions(), indent=2))
    write_text(run.config, json.dumps(record, indent=2))


def _versions() -> dict[str, str]:
    packages = ("miro-trainer", "torch", "numpy", "transformers", "open_clip_torch")
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    found = {name: installed[name] for name in packages if name in installed}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def inference_state(
    config: TrainConfig, dataset: Dataset, bins: Bins, images: int
) -> dict[str, Any]:
    """Return what sampling needs besides the EMA weights, in plain JSON types."""
    return {
        "images": images,
        "config": to_dict(config),
        "bins": json.loads(bins.to_json()),
        "encoding": dataset.encoding,
    }
