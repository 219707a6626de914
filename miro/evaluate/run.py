"""`miro evaluate`: one model, one way to ask, measured and written beside the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from miro.evaluate.measure import measure
from miro.rewards.registry import build_reward
from miro.sampling.pipeline import Pipeline
from miro.sampling.sampler import Guidance
from miro.utils.atomic_io import write_text


def evaluate(
    run: Path,
    *,
    rewards: Sequence[str],
    prompts: Path,
    count: int,
    wanted: Mapping[str, float | None],
    unwanted: Mapping[str, float | None],
    reward_scale: float = 0.0,
    text_scale: float = 0.0,
    steps: int = 16,
    seed: int = 0,
) -> Path:
    """Measure `count` images and write RUN/evaluation.json.

    Args:
        run: a run's folder or a weights folder.
        rewards: specs "name" or "name=weights".
        prompts: a UTF-8 text file, a prompt a line.

    Raises:
        ValueError: a file without prompts, an impossible target.
    """
    judges = [build_reward(spec, torch.device("cpu")) for spec in rewards]
    captions = _read_prompts(prompts, count)
    pipeline = Pipeline.load(run)
    guidance = Guidance(
        pipeline.target(wanted),
        pipeline.target(unwanted, default=0.0) if reward_scale else None,
        reward_scale,
        text_scale,
    )
    generated = pipeline(captions, guidance, seed=seed, steps=steps)
    result = measure(generated, captions, judges)
    record = {
        "images_trained": pipeline.images,
        "prompts": len(captions),
        "means": result.means,
        "standard_errors": result.errors,
        "wanted": dict(wanted),
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
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts[:count]
