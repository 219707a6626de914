"""Contact sheets of the demo: the same prompts and noise, asked for in different ways."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

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
    """Draw the demo's sheets into folder/grids, and describe them in folder/grids.json.

    1. The baseline, and MIRO at s⁺ = the setting's, 1 and 0.
    2. The specialist beside MIRO.
    3. One reward traded against another: colourfulness down as sharpness goes up, and alignment
       from 0 to 1 with the others held.
    """
    pipes = {
        model: Pipeline.load(RunFolder(folder / model).weights_written()[-1][1])
        for model in ("baseline", "miro", "only_alignment")
    }
    miro = pipes["miro"]
    prompts = [prompt.caption for prompt in heldout_prompts(columns, GRID_SEED)]

    def row(model: str, target: RewardTarget | None = None) -> Tensor:
        pipeline = pipes[model]
        asked = setting.guidance(pipeline) if target is None else Guidance(target)
        return pipeline(prompts, asked, seed=GRID_SEED, steps=setting.steps)

    low, high = miro.target(default=0.0), miro.target()
    grids = [
        _sheet(
            folder, "steering", "The same prompts and noise, asked for in different ways",
            "No guidance in any row. Only the rewards asked for differ between the MIRO rows.",
            {
                "baseline": row("baseline"),
                "MIRO, s⁺ as measured": row("miro"),
                "MIRO, all rewards at 1": row("miro", high),
                "MIRO, all rewards at 0": row("miro", low),
                "only alignment": row("only_alignment"),
            },
            prompts,
        ),
    ]  # fmt: skip
    steps = [0.0, 0.25, 0.5, 0.75, 1.0]
    trades = {
        f"sharpness {s:g}, colourfulness {1 - s:g}": miro.target(
            {"sharpness": s, "colourfulness": 1 - s}
        )
        for s in steps
    }
    grids.append(
        _sheet(
            folder, "trade", "One reward traded against another",
            "Colourfulness gives way to sharpness from the first row to the last; alignment at 1.",
            {label: row("miro", target) for label, target in trades.items()}, prompts,
        )
    )  # fmt: skip
    aligned = {f"alignment {s:g}": miro.target({"alignment": s}) for s in steps}
    grids.append(
        _sheet(
            folder, "alignment", "From a careless caption to a careful one",
            "Alignment asked for from 0 to 1, the other rewards at 1.",
            {label: row("miro", target) for label, target in aligned.items()}, prompts,
        )
    )  # fmt: skip
    write_text(folder / "grids.json", json.dumps(grids, indent=1))


def _sheet(
    folder: Path,
    name: str,
    title: str,
    caption: str,
    rows: dict[str, Tensor],
    columns: Sequence[str],
) -> dict[str, object]:
    path = folder / "grids" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    stacked = torch.stack([to_bytes(pictures) for pictures in rows.values()])
    height, width = stacked.shape[0] * stacked.shape[3], stacked.shape[1] * stacked.shape[4]
    sheet = Image.fromarray(stacked.permute(0, 3, 1, 4, 2).reshape(height, width, 3).numpy())
    sheet.save(path)
    return {
        "title": title,
        "caption": caption,
        "rows": list(rows),
        "columns": list(columns),
        "picture": f"grids/{name}.png",
        "cell": stacked.shape[4],
    }
