"""Image grids of the demo: the same prompts and noise with different reward targets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from miro.conditioning import RewardTarget
from miro.sampling.pipeline import Pipeline, to_bytes
from miro.sampling.sampler import Guidance
from miro.training.checkpoint import RunFolder
from miro.utils.atomic_io import write_text
from openmoji.scene_metrics import Setting
from openmoji.scenes import heldout_prompts

GRID_SEED = 7


def write_grids(folder: Path, setting: Setting, columns: int) -> None:
    """Write the grids to FOLDER/grids and their labels to FOLDER/grids.json.

    1. "steering": the baseline, MIRO with the setting's targets, 1 and 0, and the specialist.
    2. "trade": colourfulness traded against sharpness.
    3. "alignment": alignment from 0 to 1 with the other rewards at 1.
    """
    pipelines = {
        model: Pipeline.load(RunFolder(folder / model).weights_written()[-1][1])
        for model in ("baseline", "miro", "only_alignment")
    }
    miro = pipelines["miro"]
    prompts = [prompt.caption for prompt in heldout_prompts(columns, GRID_SEED)]

    def row(model: str, target: RewardTarget | None = None) -> Tensor:
        pipeline = pipelines[model]
        guidance = setting.guidance(pipeline) if target is None else Guidance(target)
        return pipeline(prompts, guidance, seed=GRID_SEED, steps=setting.steps)

    levels = [0.0, 0.25, 0.5, 0.75, 1.0]
    steering = {
        "baseline": row("baseline"),
        "MIRO, s⁺ as measured": row("miro"),
        "MIRO, all rewards at 1": row("miro", miro.target()),
        "MIRO, all rewards at 0": row("miro", miro.target(default=0.0)),
        "only alignment": row("only_alignment"),
    }
    trade = {
        f"sharpness {s:g}, colourfulness {1 - s:g}": row(
            "miro", miro.target({"sharpness": s, "colourfulness": 1 - s})
        )
        for s in levels
    }
    alignment = {f"alignment {s:g}": row("miro", miro.target({"alignment": s})) for s in levels}
    grids = [
        _write_grid(
            folder, "steering", "The same prompts and noise with different reward targets",
            "No guidance in any row. Only the targets differ between the MIRO rows.",
            steering, prompts,
        ),
        _write_grid(
            folder, "trade", "One reward traded against another",
            "From the first row to the last, colourfulness falls and sharpness rises; alignment "
            "is at 1.",
            trade, prompts,
        ),
        _write_grid(
            folder, "alignment", "Alignment from 0 to 1",
            "The other rewards are at 1.",
            alignment, prompts,
        ),
    ]  # fmt: skip
    write_text(folder / "grids.json", json.dumps(grids, indent=1))


def _write_grid(
    folder: Path,
    name: str,
    title: str,
    caption: str,
    rows: Mapping[str, Tensor],
    columns: Sequence[str],
) -> dict[str, Any]:
    """Write one grid; returns its record in grids.json."""
    path = folder / "grids" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    stacked = torch.stack([to_bytes(images) for images in rows.values()])
    height, width = stacked.shape[0] * stacked.shape[3], stacked.shape[1] * stacked.shape[4]
    grid = Image.fromarray(stacked.permute(0, 3, 1, 4, 2).reshape(height, width, 3).numpy())
    grid.save(path)
    return {
        "title": title,
        "caption": caption,
        "rows": list(rows),
        "columns": list(columns),
        "image": f"grids/{name}.png",
        "cell": stacked.shape[4],
    }
