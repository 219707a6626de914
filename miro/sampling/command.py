"""`miro sample`: images of prompts as PNG files, each with the settings to sample it again.

The settings are in a JSON file beside the image and in the PNG, as its text "miro".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from miro.images.buckets import aspect_ratio
from miro.rewards.registry import build_reward
from miro.sampling.pipeline import Pipeline, to_bytes
from miro.sampling.sampler import best_of
from miro.utils.atomic_io import write_text

Levels = Mapping[str, float | None]


def sample_images(
    run: Path,
    prompts: Sequence[str],
    *,
    positive: Levels,
    negative: Levels | None = None,
    reward_scale: float = 0.0,
    text_scale: float = 0.0,
    steps: int = 50,
    seed: int = 0,
    noise: int = 0,
    count: int = 1,
    candidates: int = 1,
    best_by: str | None = None,
    aspect: str | None = None,
    out: Path | None = None,
    device: str = "cpu",
) -> list[Path]:
    """Sample `count` images per prompt, each the best of `candidates` by the reward `best_by`.

    Args:
        run: a run's folder or a weights folder.
        prompts: what to sample.
        positive: quantile levels s⁺ by reward; 1 for a conditioned reward not named.
        negative: quantile levels s⁻ by reward; 0 for a reward not named.
        reward_scale: ω of `Guidance`.
        text_scale: τ of `Guidance`.
        steps: Euler steps.
        seed: seed of the noise.
        noise: number of the first noise of each prompt.
        count: images per prompt.
        candidates: images sampled per image written.
        best_by: the reward that ranks candidates, NAME or NAME=weights.
        aspect: such as 4:3; the nearest training bucket is sampled.
        out: folder for the files, numbered from the highest number there on; None: `run`/samples.
        device: device to compute on.

    Returns:
        The PNG files, in the order of the prompts.

    Raises:
        ValueError: an empty prompt, or an impossible count, target or reward.
    """
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError("a prompt is empty; describe the image to sample")
    if count < 1 or candidates < 1:
        raise ValueError(f"count and best-of must be at least 1, got {count} and {candidates}")
    if candidates > 1 and best_by is None:
        raise ValueError(f"best of {candidates} needs a reward to choose by: --best-by NAME")
    ratio = None if aspect is None else aspect_ratio(aspect)
    reward = build_reward(best_by, torch.device(device)) if best_by is not None else None
    pipeline = Pipeline.load(run, device)
    guidance = pipeline.guidance(positive, negative, reward_scale, text_scale)
    captions = [prompt for prompt in prompts for _ in range(count * candidates)]
    # All prompts share the same noises, so that their images can be compared.
    numbers = list(range(noise, noise + count * candidates)) * len(prompts)
    shape = pipeline.shape(ratio)
    images = to_bytes(
        pipeline(captions, guidance, seed=seed, numbers=numbers, steps=steps, shape=shape)
    )
    if reward is not None:
        best = best_of(reward.score(list(images), captions), candidates).tolist()
        captions, numbers = [captions[i] for i in best], [numbers[i] for i in best]
        images = images[best]
    settings = {
        "seed": seed,
        "positive": dict(zip(pipeline.rewards, guidance.positive.levels, strict=True)),
        "negative": guidance.negative
        and dict(zip(pipeline.rewards, guidance.negative.levels, strict=True)),
        "reward_scale": reward_scale,
        "text_scale": text_scale,
        "steps": steps,
        "shape": shape,
        "run": str(run),
        "images": pipeline.images,
        "precision": pipeline.config.precision,
    }
    out = run / "samples" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    first = 1 + max((int(p.stem) for p in out.glob("*.png") if p.stem.isdecimal()), default=-1)
    return [
        _write(out / f"{index:04d}", image, {"prompt": caption, "noise": number, **settings})
        for index, (image, caption, number) in enumerate(
            zip(images, captions, numbers, strict=True), first
        )
    ]


def _write(stem: Path, image: Tensor, settings: Mapping[str, object]) -> Path:
    record = json.dumps(settings)
    text = PngInfo()
    text.add_text("miro", record)
    path = stem.with_suffix(".png")
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, pnginfo=text)
    write_text(stem.with_suffix(".json"), record)
    return path
