"""The commands for trained models: sample, evaluate and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from miro.utils.progress import console

Inline = tyro.conf.arg(name="")
Positional = tyro.conf.Positional


@dataclass(frozen=True)
class _Sampling:
    """Targets, guidance and solver."""

    reward: tuple[str, ...] = ()
    """Reward targets NAME=LEVEL, 0 to 1, or NAME=off; a reward that is not named is at 1."""
    negative: tuple[str, ...] = ()
    """Negative target of reward guidance, NAME=LEVEL; a reward that is not named is at 0."""
    reward_scale: float = 0.0
    """ω, strength of reward guidance; 0 for none."""
    text_scale: float = 0.0
    """Strength of classifier-free guidance by text; 0 for none."""
    steps: int = 50
    seed: int = 0


def _levels(pairs: Sequence[str], option: str) -> dict[str, float | None]:
    """Parse ["aesthetic=0.6", "clip=off"] to quantile levels by name."""
    levels: dict[str, float | None] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            levels[name] = None if value == "off" else float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(
                f"{option} {pair!r} must be NAME=LEVEL, a level from 0 (worst of the data) to 1 "
                "(best), or NAME=off for no target"
            )
    return levels


def sample(
    run: Positional[Path],
    prompt: tuple[str, ...],
    sampling: Annotated[_Sampling, Inline] = _Sampling(),  # noqa: B008 frozen
    count: int = 1,
    noise: int = 0,
    best_of: int = 1,
    best_by: str | None = None,
    aspect: str | None = None,
    out: Path | None = None,
    device: str = "cpu",
) -> None:
    """Generate images of prompts.

    Args:
        run: a run's folder, or one of its weights folders.
        prompt: one or more captions.
        sampling: targets, guidance and solver.
        count: images per prompt.
        noise: number of the first noise; prompts share their noises.
        best_of: candidates per image, of which the best is written.
        best_by: the reward that ranks candidates, NAME or NAME=weights.
        aspect: ratio such as 4:3; the nearest shape that the run was trained on is used.
        out: folder for the PNG files, to which a call adds; RUN/samples if not given.
        device: where to compute.
    """
    from miro.sampling.command import sample_images

    guided = sampling.negative or sampling.reward_scale
    written = sample_images(
        run,
        prompt,
        positive=_levels(sampling.reward, "--reward"),
        negative=_levels(sampling.negative, "--negative") if guided else None,
        reward_scale=sampling.reward_scale,
        text_scale=sampling.text_scale,
        steps=sampling.steps,
        seed=sampling.seed,
        noise=noise,
        count=count,
        candidates=best_of,
        best_by=best_by,
        aspect=aspect,
        out=out,
        device=device,
    )
    print(*written, sep="\n")


def evaluate(
    run: Positional[Path],
    rewards: tuple[str, ...] = ("colourfulness", "sharpness"),
    *,
    prompts: Path,
    count: int = 192,
    sampling: Annotated[_Sampling, Inline] = _Sampling(steps=16),  # noqa: B008 frozen
) -> None:
    """Score a model's images with rewards.

    Args:
        run: a run's folder, or one of its weights folders.
        rewards: names, or name=weights.
        prompts: a text file with one prompt per line.
        count: number of prompts.
        sampling: targets, guidance and solver.
    """
    from miro.evaluate.run import evaluate as run_evaluation

    path = run_evaluation(
        run,
        rewards=rewards,
        prompts=prompts,
        count=count,
        positive=_levels(sampling.reward, "--reward"),
        negative=_levels(sampling.negative, "--negative"),
        reward_scale=sampling.reward_scale,
        text_scale=sampling.text_scale,
        steps=sampling.steps,
        seed=sampling.seed,
    )
    print(path.read_text())
    console.print(f"written to {path}")


def report(run: Positional[Path]) -> None:
    """Write a run's HTML report.

    Args:
        run: the folder of a training run.
    """
    from miro.report.run_page import write_run_report

    print(write_run_report(run))
