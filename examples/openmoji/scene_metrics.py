"""How well a model does what it is asked: rewards, the verifier's verdict, speed-up.

A setting is a way to ask (targets and guidance scales) fixed before anything is measured. The same
prompts and the same noise serve every model and setting, so that differences are the models'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from miro.rewards.base import Reward
from miro.sampling.pipeline import Pipeline, to_bytes
from miro.sampling.sampler import Guidance
from openmoji.compositions import Statement
from openmoji.verifier import Verifier, accuracy_by_category, verdicts

VERIFIER = "verifier"
CURVE_START = 0.15
"""Share of the run before which curves are not read: the pictures are noise, which is colourful."""


@dataclass(frozen=True)
class Setting:
    """One way to ask a model. Levels are for the rewards it was trained on; others are ignored."""

    text_scale: float = 0.0
    targets: Mapping[str, float] = field(default_factory=dict)
    """Levels asked for; a trained reward not named is asked for at 1."""
    reward_scale: float = 0.0
    """Scale of the guidance away from level 0 of every reward asked for."""
    steps: int = 16
    description: str = ""
    """A sentence for the report."""

    def guidance(self, pipeline: Pipeline) -> Guidance:
        """This setting for a model, whatever it was trained on."""
        positive = pipeline.target()
        known = {
            name: level
            for (name, asked) in zip(pipeline.rewards, positive.levels, strict=True)
            if asked is not None and (level := self.targets.get(name)) is not None
        }
        negative = pipeline.target(default=0.0) if self.reward_scale else None
        return Guidance(pipeline.target(known), negative, self.reward_scale, self.text_scale)


@dataclass(frozen=True)
class Measurement:
    """Means over pictures, and their standard errors."""

    means: dict[str, float]
    errors: dict[str, float]
    by_category: dict[str, float]
    """The verifier's share of pictures that show what was said; empty without statements."""


def measure(
    pictures: Tensor,
    captions: Sequence[str],
    rewards: Sequence[Reward],
    verifier: Verifier | None = None,
    said: Sequence[Statement] = (),
) -> Measurement:
    """Score pictures (B, 3, H, W) in [0, 1] of the captions they were asked for.

    The verifier's mean is over categories, each counting the same, as GenEval's is.
    """
    images = to_bytes(pictures)
    means, errors, by_category = {}, {}, {}
    for reward in rewards:
        scores = reward.score(list(images), captions).double()
        known = scores[scores.isfinite()]
        means[reward.name] = float(known.mean())
        errors[reward.name] = float(known.std() / max(len(known), 1) ** 0.5)
    if verifier is not None:
        verdict = verdicts(verifier, images, said)
        by_category = accuracy_by_category(verdict, said)
        shares = torch.tensor(list(by_category.values()), dtype=torch.float64)
        counts = torch.tensor([sum(s.category == c for s in said) for c in by_category])
        means[VERIFIER] = float(shares.mean())
        variance = (shares * (1 - shares) / counts).sum() / len(shares) ** 2
        errors[VERIFIER] = float(variance.sqrt())
    return Measurement(means, errors, by_category)


def diversity(pipeline: Pipeline, captions: Sequence[str], setting: Setting, seeds: int) -> float:
    """Mean distance between pictures of one caption from different noise.

    The distance is the root mean square over pixels in [0, 1]; 0 is a model that always draws the
    same picture.
    """
    repeated = [caption for caption in captions for _ in range(seeds)]
    pictures = pipeline(repeated, setting.guidance(pipeline), seed=1, steps=setting.steps)
    groups = pictures.flatten(1).unflatten(0, (len(captions), seeds))
    distances = torch.cdist(groups, groups) / groups.shape[-1] ** 0.5
    return float(distances.sum() / (len(captions) * seeds * (seeds - 1)))
