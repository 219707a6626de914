"""What a run's folder records of the run: configuration, reward bins, versions, inference state."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping
from typing import Any, Literal

from miro.conditioning import Bins
from miro.data.dataset_base import Dataset
from miro.training.batch_plan import BatchPlan
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.metrics_log import read_metrics
from miro.utils.atomic_io import write_text
from miro.utils.serialize import differences, from_dict, to_dict

log = logging.getLogger(__name__)

# Fields that may change when a run is resumed: none of them changes a result.
FREE_TO_CHANGE = (
    "report_every",
    "peak_flops",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "on_failed_save",
    "ema_weights_at",
    "data",
    "init",
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
        try:
            # An option that this version added has its default in an older run.
            previous = to_dict(from_dict(TrainConfig, json.loads(run.config.read_text())))
        except ValueError as error:
            raise ValueError(f"{run.config} cannot be read: {error}") from error
        changed = differences(
            {k: v for k, v in record.items() if k not in FREE_TO_CHANGE},
            {k: v for k, v in previous.items() if k not in FREE_TO_CHANGE},
        )
        if changed:
            raise ValueError(
                f"{run.root} has a run of another configuration ({'; '.join(changed)}); give "
                "the same configuration to resume it, or choose another folder, in which "
                f"--init {run.root} begins from its weights"
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


def check_begins_anew(run: RunFolder, checkpoint_every: int) -> None:
    """Check that a run without any checkpoint was interrupted before its first one.

    Raises:
        ValueError: its metrics show that it has had one.
    """
    lines = read_metrics(run.metrics)
    images = lines[-1]["images"] if lines else 0
    # The first is on disk before the second is begun.
    if images > 2 * checkpoint_every:
        raise ValueError(
            f"{run.root} trained for {images:,} images and has no checkpoint in {run.checkpoints}; "
            "restore one, or begin again in another folder"
        )
    if images:
        log.warning(
            "%s: interrupted after %d images, before the first checkpoint; it begins again",
            run.root, images,
        )  # fmt: skip


def check_encoding(run: RunFolder, saved: Mapping[str, Any], dataset: Dataset) -> None:
    """Check that the data to resume on is encoded as that of the checkpoint was.

    Args:
        run: the folder, for the message.
        saved: the checkpoint's record of the encoding.
        dataset: the data.

    Raises:
        ValueError: it is not.
    """
    ours, theirs = (
        {key: value for key, value in encoding.items() if key != "cut"}
        for encoding in (dataset.encoding, saved)
    )
    # As JSON has it, with lists for tuples.
    if found := differences(json.loads(json.dumps(ours)), theirs):
        raise ValueError(
            f"{run.root} was trained on data of another encoding than {dataset.folder} has "
            f"({'; '.join(found)}); encode the data as before, or choose another folder"
        )


def digests(config: TrainConfig, bins: Bins, dataset: Dataset, plan: BatchPlan) -> dict[str, str]:
    """Return checksums of what must be equal on all ranks, by a name for messages."""
    record = {k: v for k, v in to_dict(config).items() if k not in ("data", "threads")}
    parts = {
        "configuration": json.dumps(record),
        "reward bins": bins.to_json(),
        "encoding": json.dumps(dataset.encoding),
        "plan": repr(plan),
        "samples": "\n".join(dataset.keys),
    }
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}


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
