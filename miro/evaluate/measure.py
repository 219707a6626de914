"""How well a model does what it is asked: rewards, the verifier's verdict, speed-up.

A setting is a way to ask (targets and guidance scales) fixed before anything is measured. The same
prompts and the same noise serve every model and setting, so that differences are the models'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from miro.rewards.base import Reward
from miro.sampling.pipeline import to_bytes


@dataclass(frozen=True)
class Measurement:
    """Means over images, and their standard errors."""

    means: dict[str, float]
    errors: dict[str, float]


def measure(
    generated: Tensor,
    captions: Sequence[str],
    rewards: Sequence[Reward],
) -> Measurement:
    """Score images (B, 3, H, W) in [0, 1] of the captions they were asked for."""
    images = to_bytes(generated)
    means, errors = {}, {}
    for reward in rewards:
        scores = reward.score(list(images), captions).double()
        known = scores[scores.isfinite()]
        means[reward.name] = float(known.mean())
        errors[reward.name] = float(known.std() / max(len(known), 1) ** 0.5)
    return Measurement(means, errors)


def crossing(
    marks: Sequence[int], curve: Sequence[float], final: float, start: int
) -> float | None:
    """Images from which on the curve stays above `final`, or None if it ends below.

    Between two marks it is taken for a straight line. Marks before `start` are not read: images
    of a young model are noise, and noise is colourful.
    """
    read = [point for point in zip(marks, curve, strict=True) if point[0] >= start]
    below = [number for number, (_, value) in enumerate(read) if value <= final]
    if not below:
        return float(read[0][0])
    if below[-1] == len(read) - 1:
        return None
    (before, low), (after, high) = read[below[-1] : below[-1] + 2]
    return before + (after - before) * (final - low) / (high - low)


def data_efficiency(
    marks: Sequence[int], baseline: Sequence[float], curve: Sequence[float], start: int
) -> float | None:
    """Images of the baseline's run over those after which `curve` stays above its final score.

    None where the curve ends below. The paper's convergence speed-up (arXiv 2510.25897, figure 3).
    """
    reached = crossing(marks, curve, baseline[-1], start)
    return None if reached is None else marks[-1] / reached
