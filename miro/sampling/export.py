"""`miro export`: EMA weights with everything that sampling from them needs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from miro.training import checkpoint
from miro.training.checkpoint import CheckpointError, CheckpointReader, RunFolder


def export(run: Path, dest: Path, images: int | None = None) -> Path:
    """Write a run's EMA weights as one safetensors file, with a JSON file beside it.

    The JSON file holds the configuration, the bins and the names of the encoders, so `miro sample`
    needs nothing but the folder.

    Args:
        run: a run's folder. The weights come from its weights folders or, if none has `images`,
            from a checkpoint saved by any number of ranks.
        dest: the folder to create; must not exist.
        images: export the weights after this many images; None: the newest.

    Returns:
        dest.

    Raises:
        CheckpointError: there are no such weights, or they are damaged.
        ValueError: dest exists.
    """
    if dest.exists():
        raise ValueError(f"{dest} exists already; choose another folder")
    folder = RunFolder(run)
    weights = dict(folder.weights_written())
    checkpoints = dict(checkpoint.list_checkpoints(folder.checkpoints))
    if not weights and not checkpoints:
        raise CheckpointError(f"{run} is not a run that has written weights or checkpoints")
    chosen = max(weights | checkpoints) if images is None else images
    if chosen in weights:
        tensors, state = checkpoint.load(weights[chosen])
    elif chosen in checkpoints:
        tensors, state = _merge_ema(folder, checkpoints[chosen])
    else:
        available = ", ".join(map(str, sorted(weights | checkpoints)))
        raise CheckpointError(f"{run} has no weights at {chosen} images; choose one of {available}")
    checkpoint.save(dest, tensors, state)
    return dest


def _merge_ema(run: RunFolder, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The EMA weights of a checkpoint, merged from the shards of all ranks."""
    reader = CheckpointReader(folder)
    reader.check()
    tensors = {
        name: reader.read("ema", name, 0, math.prod(shape)).view(shape)
        for name, shape in reader.state["shapes"].items()
    }
    state = {
        "images": reader.state["images"],
        "config": json.loads(run.config.read_text()),
        "bins": json.loads(run.bins.read_text()),
        "encoding": reader.state["encoding"],
    }
    return tensors, state
