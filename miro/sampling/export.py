"""`miro export`: inference weights, with all that sampling from them needs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from miro.training import checkpoint
from miro.training.checkpoint import CheckpointError, CheckpointReader, RunFolder


def export(run: Path, dest: Path, images: int | None = None) -> Path:
    """Write the averaged weights of a run as one safetensors file, with their state beside it.

    The state holds the configuration, the bins of each reward and the names of the encoders; the
    folder is all that `miro sample` is given.

    Args:
        run: a run's folder. Weights come from its weights or, where there are none of `images`,
            from a checkpoint, of however many ranks.
        dest: the folder to make; must not exist.
        images: which; None takes the newest.

    Returns:
        dest.

    Raises:
        CheckpointError: there are none, or they are damaged.
        ValueError: dest exists.
    """
    if dest.exists():
        raise ValueError(f"{dest} exists already; choose another folder")
    folder = RunFolder(run)
    written = dict(folder.weights_written())
    saved = dict(checkpoint.list_checkpoints(folder.checkpoints))
    if not written and not saved:
        raise CheckpointError(f"{run} is not a run that has written weights or checkpoints")
    wanted = max(written | saved) if images is None else images
    if wanted in written:
        tensors, state = checkpoint.load(written[wanted])
    elif wanted in saved:
        tensors, state = _averaged(folder, saved[wanted])
    else:
        known = ", ".join(map(str, sorted(written | saved)))
        raise CheckpointError(f"{run} has nothing of {wanted} images; it has {known}")
    checkpoint.save(dest, tensors, state)
    return dest


def _averaged(run: RunFolder, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The average in a checkpoint, put together from the parts of all ranks."""
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
