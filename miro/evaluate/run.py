"""`miro evaluate`: mean reward scores of a model's images, written to evaluation.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from miro.evaluate.measure import measure
from miro.rewards.registry import build_reward
from miro.sampling.pipeline import Pipeline
from miro.utils.atomic_io import write_text


def evaluate(
    run: Path,
    *,
    rewards: Sequence[str],
    prompts: Path,
    count: int,
    positive: Mapping[str, float | None],
    negative: Mapping[str, float | None],
    reward_scale: float = 0.0,
    text_scale: float = 0.0,
    steps: int = 16,
    seed: int = 0,
) -> Path:
    """Score one image of each of the first `count` prompts and write RUN/evaluation.json.

    Args:
        run: a run's folder or a weights folder.
        rewards: rewards to score with, NAME or NAME=weights.
        prompts: a UTF-8 text file, one prompt per line.
        count: number of prompts to use.
        positive: quantile levels s⁺ by reward; 1 for a conditioned reward not named.
        negative: quantile levels s⁻ by reward; 0 for a reward not named.
        reward_scale: ω of `Guidance`.
        text_scale: τ of `Guidance`.
        steps: Euler steps.
        seed: seed of the noise.

    Returns:
        The path of evaluation.json.

    Raises:
        ValueError: a file without prompts, or an impossible target.
    """
    scorers = [build_reward(spec, torch.device("cpu")) for spec in rewards]
    captions = _read_prompts(prompts, count)
    pipeline = Pipeline.load(run)
    guidance = pipeline.guidance(positive, negative, reward_scale, text_scale)
    result = measure(pipeline(captions, guidance, seed=seed, steps=steps), captions, scorers)
    record = {
        "images_trained": pipeline.images,
        "prompts": len(captions),
        "mean_scores": result.means,
        "standard_errors": result.errors,
        "positive_levels": dict(positive),
        "negative_levels": dict(negative),
        "reward_scale": reward_scale,
        "text_scale": text_scale,
        "steps": steps,
        "seed": seed,
    }
    path = run / "evaluation.json"
    write_text(path, json.dumps(record, indent=2))
    return path


def _read_prompts(path: Path, count: int) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} contains no prompts; write one per line")
    return prompts[:count]
