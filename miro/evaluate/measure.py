"""Evaluation metrics: mean reward scores of sampled images, and data efficiency.

Models are compared on the same prompts and the same noise, at guidance settings fixed beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from miro.rewards.base import Reward
from miro.sampling.pipeline import to_bytes


@dataclass(frozen=True)
class Measurement:
    """Mean score of each reward over a set of images, and its standard error."""

    means: dict[str, float]
    errors: dict[str, float]


def measure(images: Tensor, captions: Sequence[str], rewards: Sequence[Reward]) -> Measurement:
    """Score images (B, 3, H, W) in [0, 1] with their captions; NaN scores are left out."""
    uint8 = list(to_bytes(images))
    means, errors = {}, {}
    for reward in rewards:
        scores = reward.score(uint8, captions).double()
        known = scores[scores.isfinite()]
        means[reward.name] = float(known.mean())
        errors[reward.name] = float(known.std() / max(len(known), 1) ** 0.5)
    return Measurement(means, errors)


def images_to_reach(
    images: Sequence[int], scores: Sequence[float], target: float, start: int
) -> float | None:
    """Training images after which a score stays above `target`, interpolated linearly.

    Args:
        images: training images at each evaluation, ascending.
        scores: the score at each evaluation.
        target: the score to reach.
        start: evaluations before this many images are ignored: a barely trained model samples
            noise, which some rewards score highly.

    Returns:
        None if the last score is not above `target`.
    """
    curve = [point for point in zip(images, scores, strict=True) if point[0] >= start]
    below = [index for index, (_, score) in enumerate(curve) if score <= target]
    if not below:
        return float(curve[0][0])
    if below[-1] == len(curve) - 1:
        return None
    (before, low), (after, high) = curve[below[-1] : below[-1] + 2]
    return before + (after - before) * (target - low) / (high - low)


def data_efficiency(
    images: Sequence[int], baseline: Sequence[float], scores: Sequence[float], start: int
) -> float | None:
    """Images the baseline needs over images the model needs for the baseline's final score.

    The paper's convergence speed-up (arXiv 2510.25897, figure 3). Arguments as `images_to_reach`;
    None if the model ends below the baseline.
    """
    reached = images_to_reach(images, scores, baseline[-1], start)
    return None if reached is None else images[-1] / reached
