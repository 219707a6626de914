"""Does the alignment reward read? A true caption against one with a single thing wrong."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from miro.rewards.base import Reward
from openmoji.compositions import HARD_KINDS
from openmoji.scenes import SceneStream, hard_captions, pictures, variants

TEST_SEED = 31_337


def auc(right: Tensor, wrong: Tensor) -> float:
    """Probability that a score of `right` is above one of `wrong`, ties counting half."""
    both = torch.cat((right, wrong)).double()
    ordered, inverse, counts = both.unique(return_inverse=True, return_counts=True)
    rank = counts.cumsum(0) - (counts - 1) / 2
    total = rank[inverse[: len(right)]].sum() - len(right) * (len(right) + 1) / 2
    return float(total / (len(right) * len(wrong)))


def alignment_auc(
    reward: Reward, *, scenes: int = 1_000, strength: float = 0.0
) -> Mapping[str, float]:
    """AUC of the reward for each way to be wrong, on fresh pictures of the training's compositions.

    A composition that no training caption states is judged unlikely for that alone: held-out ones
    would measure this prior, not whether the reward reads.

    Args:
        reward: a reward that reads captions.
        scenes: pictures of each kind; all true scores are compared with all wrong ones.
        strength: of blur, noise and faded colours; 0 for clean pictures.
    """
    stream = SceneStream(TEST_SEED, "train", wrong_captions=0.0, strength=strength)
    found, index = {}, 0
    wanted = {kind: [] for kind in HARD_KINDS}
    while any(len(samples) < scenes for samples in wanted.values()):
        sample = stream[index]
        index += 1
        for kind, samples in wanted.items():
            if len(samples) < scenes and variants(sample.said, kind):
                samples.append(sample)
    rng = np.random.default_rng(TEST_SEED)
    for kind, samples in wanted.items():
        images = list(torch.from_numpy(pictures(samples)).permute(0, 3, 1, 2))
        right = [sample.said.caption for sample in samples]
        wrong = [hard_captions(sample.said, kind, rng) for sample in samples]
        found[kind] = auc(reward.score(images, right), reward.score(images, wrong))
    return found
