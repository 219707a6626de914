"""Evaluation of a model on scene prompts: rewards, verifier accuracy, and diversity.

Targets and guidance scales are fixed in a Setting before anything is measured. All models and
settings get the same prompts and the same noise, so differences are due to the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from miro.evaluate.measure import measure
from miro.rewards.base import Reward
from miro.sampling.pipeline import Pipeline, to_bytes
from miro.sampling.sampler import Guidance
from openmoji.compositions import CaptionSpec
from openmoji.verifier import Verifier, accuracy_by_category, verify

VERIFIER = "verifier"
CURVE_START = 0.15
"""Fraction of the training before which curves are ignored: noisy images are colourful."""


@dataclass(frozen=True)
class Setting:
    """Targets and guidance of the samples to evaluate.

    Attributes:
        text_scale: Scale of text guidance.
        targets: Quantile levels by reward. The default is 1; rewards that a model was not trained
            on are ignored.
        reward_scale: Scale of guidance away from level 0 of all rewards.
        steps: Of the sampler.
        description: A sentence for the report.
    """

    text_scale: float = 0.0
    targets: Mapping[str, float] = field(default_factory=dict)
    reward_scale: float = 0.0
    steps: int = 16
    description: str = ""

    def guidance(self, pipeline: Pipeline) -> Guidance:
        """The Guidance for a model, given the rewards it was trained on."""
        positive = pipeline.target()
        known = {
            name: level
            for (name, default) in zip(pipeline.rewards, positive.levels, strict=True)
            if default is not None and (level := self.targets.get(name)) is not None
        }
        negative = pipeline.target(default=0.0) if self.reward_scale else None
        return Guidance(pipeline.target(known), negative, self.reward_scale, self.text_scale)


@dataclass(frozen=True)
class SceneMeasurement:
    """Means over images and their standard errors, by metric.

    Attributes:
        means: Of each reward and the verifier.
        errors: Standard errors of the means.
        by_category: Verifier accuracy.
    """

    means: dict[str, float]
    errors: dict[str, float]
    by_category: dict[str, float]


def measure_scenes(
    images: Tensor, specs: Sequence[CaptionSpec], rewards: Sequence[Reward], verifier: Verifier
) -> SceneMeasurement:
    """Evaluate images (B, 3, H, W) in [0, 1] of B captions.

    The verifier's mean weights all categories equally, as GenEval's does.
    """
    scores = measure(images, [spec.caption for spec in specs], rewards)
    found = verify(verifier, to_bytes(images), specs)
    by_category = accuracy_by_category(found, specs)
    shares = torch.tensor(list(by_category.values()), dtype=torch.float64)
    counts = torch.tensor([sum(s.category == c for s in specs) for c in by_category])
    variance = (shares * (1 - shares) / counts).sum() / len(shares) ** 2
    return SceneMeasurement(
        {**scores.means, VERIFIER: float(shares.mean())},
        {**scores.errors, VERIFIER: float(variance.sqrt())},
        by_category,
    )


def diversity(pipeline: Pipeline, captions: Sequence[str], setting: Setting, seeds: int) -> float:
    """Mean RMS distance of pixels in [0, 1] between images of one caption from different noise."""
    repeated = [caption for caption in captions for _ in range(seeds)]
    images = pipeline(repeated, setting.guidance(pipeline), seed=1, steps=setting.steps)
    groups = images.flatten(1).unflatten(0, (len(captions), seeds))
    distances = torch.cdist(groups, groups) / groups.shape[-1] ** 0.5
    return float(distances.sum() / (len(captions) * seeds * (seeds - 1)))
