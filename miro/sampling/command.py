"""`miro sample`: images of prompts as PNG files, each with a record of how it was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miro.images.buckets import aspect as ratio
from miro.rewards.registry import build_reward
from miro.sampling.pipeline import Pipeline, to_bytes
from miro.sampling.sampler import Guidance, best_of
from miro.utils.atomic_io import write_text

Levels = Mapping[str, float | None]


def draw(
    run: Path,
    prompts: Sequence[str],
    *,
    wanted: Levels,
    unwanted: Levels | None = None,
    reward_scale: float = 0.0,
    text_scale: float = 0.0,
    steps: int = 50,
    seed: int = 0,
    count: int = 1,
    candidates: int = 1,
    best_by: str | None = None,
    aspect: str | None = None,
    out: Path | None = None,
    device: str = "cpu",
) -> list[Path]:
    """Draw `count` images of each prompt, each the best of `candidates` by the reward `best_by`.

    Args:
        run: a run's folder or a weights folder.
        prompts: what to draw.
        wanted: levels asked for by reward; a trained reward not named is asked for at 1.
        unwanted: levels reward guidance moves away from; a reward not named is at 0.
        aspect: as 4:3; the images are of the nearest shape the run was trained on.
        out: folder for the files; `run`/samples where None.

    Returns:
        The PNG files, in the order of the prompts.

    Raises:
        ValueError: an empty prompt, an impossible count, target or reward.
    """
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError("a prompt is empty; say what to draw")
    if count < 1 or candidates < 1:
        raise ValueError(f"count and best-of must be at least 1, got {count} and {candidates}")
    if candidates > 1 and best_by is None:
        raise ValueError(f"best of {candidates} needs a reward to choose by: --best-by NAME")
    wide = None if aspect is None else ratio(aspect)
    judge = build_reward(best_by, torch.device(device)) if best_by is not None else None
    pipeline = Pipeline.load(run, device)
    guidance = Guidance(
        pipeline.target(wanted),
        pipeline.target(unwanted, default=0.0) if reward_scale else None,
        reward_scale,
        text_scale,
    )
    captions = [prompt for prompt in prompts for _ in range(count * candidates)]
    # Every prompt starts from the same noises, so that prompts can be compared.
    numbers = list(range(count * candidates)) * len(prompts)
    shape = pipeline.shape(wide)
    generated = to_bytes(
        pipeline(captions, guidance, seed=seed, numbers=numbers, steps=steps, shape=shape)
    )
    if judge is not None:
        chosen = best_of(judge.score(list(generated), captions), candidates).tolist()
        captions, numbers = [captions[i] for i in chosen], [numbers[i] for i in chosen]
        generated = generated[chosen]
    out = run / "samples" if out is None else out
    return [
        _write(out / f"{index:04d}", image, {"prompt": caption, "seed": seed, "noise": number})
        for index, (image, caption, number) in enumerate(
            zip(generated, captions, numbers, strict=True)
        )
    ]


def _write(stem: Path, image: Tensor, record: Mapping[str, object]) -> Path:
    stem.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stem.with_suffix(".png"))
    write_text(stem.with_suffix(".json"), json.dumps(record))
    return stem.with_suffix(".png")
