"""The alignment reward: how well an image supports its caption, by a CoCa fitted to the dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miro.rewards.base import Reward, RewardOptions, batches_by_size
from openmoji.coca import load_captioner
from openmoji.compositions import HARD_NEGATIVES, hard_negative, variants
from openmoji.scenes import SceneStream, render_samples

MAX_CACHED_CAPTIONS = 100_000
TEST_SEED = 31_337


class Alignment:
    """Normalized pointwise mutual information of an image and its caption.

        (log p(caption | image) − log p(caption)) / −log p(caption)

    1 if the image determines every word, 0 if it is uninformative, below 0 if it contradicts the
    caption. Without the normalization long true captions would outscore short ones. Captions longer
    than the network's context are truncated. An empty caption gives 0/0 = NaN, a missing score.

    Args:
        weights: The folder that `python -m openmoji fit-clip` wrote.
        options: Only the device is used.
    """

    name = "alignment"
    model = "open_clip CoCa of openmoji fit-clip"
    reads_caption = True

    def __init__(self, weights: str | None, options: RewardOptions) -> None:
        if weights is None:
            raise ValueError(
                "alignment needs weights: run `python -m openmoji fit-clip DATA FOLDER` and give "
                "openmoji.alignment:Alignment=FOLDER"
            )
        self._device = torch.device(options.device)
        self._model = load_captioner(Path(weights), self._device)
        self._unconditional: dict[str, Tensor] = {}

    @torch.inference_mode()
    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        scores = torch.empty(len(images), device=self._device)
        for indices, pixels in batches_by_size(images, captions, self._device):
            texts = [captions[int(i)] for i in indices]
            tokens = self._model.tokenize(texts)
            conditional = self._model.log_likelihoods(self._model.encode_image(pixels), tokens)
            unconditional = self._unconditional_log_likelihoods(texts).sum(1)
            scores[indices] = (conditional.sum(1) - unconditional) / -unconditional
        return scores

    def _unconditional_log_likelihoods(self, captions: Sequence[str]) -> Tensor:
        """(B, context − 1); cached, as it does not depend on the image."""
        cache = self._unconditional
        new = [caption for caption in dict.fromkeys(captions) if caption not in cache]
        if new:
            if len(cache) > MAX_CACHED_CAPTIONS:
                cache.clear()
                new = list(dict.fromkeys(captions))
            found = self._model.unconditional_log_likelihoods(self._model.tokenize(new))
            cache.update(zip(new, found.unbind(), strict=True))
        return torch.stack([cache[caption] for caption in captions])


def auc(positive: Tensor, negative: Tensor) -> float:
    """The probability that a positive score exceeds a negative one; ties count half."""
    both = torch.cat((positive, negative)).double()
    _, inverse, counts = both.unique(return_inverse=True, return_counts=True)
    rank = counts.cumsum(0) - (counts - 1) / 2
    total = rank[inverse[: len(positive)]].sum() - len(positive) * (len(positive) + 1) / 2
    return float(total / (len(positive) * len(negative)))


def alignment_auc(
    reward: Reward, *, scenes: int = 1_000, strength: float = 0.0
) -> Mapping[str, float]:
    """AUC of true captions against captions with one error, by kind of error.

    The images are new, but of training compositions: the model finds captions of held-out ones
    unlikely in any case, so these would measure its prior.

    Args:
        reward: The reward.
        scenes: Images per kind; all true scores are compared with all wrong ones.
        strength: Of the degradations; 0 for clean images.
    """
    stream = SceneStream(TEST_SEED, "train", wrong_captions=0.0, strength=strength)
    found, index = {}, 0
    by_kind = {kind: [] for kind in HARD_NEGATIVES}
    while any(len(samples) < scenes for samples in by_kind.values()):
        sample = stream[index]
        index += 1
        for kind, samples in by_kind.items():
            if len(samples) < scenes and variants(sample.caption_spec, kind):
                samples.append(sample)
    rng = np.random.default_rng(TEST_SEED)
    for kind, samples in by_kind.items():
        images = list(torch.from_numpy(render_samples(samples)).permute(0, 3, 1, 2))
        positive = [sample.caption_spec.caption for sample in samples]
        negative = [hard_negative(sample.caption_spec, kind, rng) for sample in samples]
        found[kind] = auc(reward.score(images, positive), reward.score(images, negative))
    return found
