"""The alignment reward: how far a picture bears out its caption, by a judge fitted here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from miro.rewards.base import RewardOptions, batches_by_size
from openmoji.coca import load_captioner


class Alignment:
    """How much of what a caption says the picture bears out, by an open_clip CoCa fitted here.

    The sum of r_w over the caption's words (openmoji.coca) as a share of what the caption
    says at all, −Σ log p(word | words before), which is normalised pointwise mutual information: 1
    where the picture leaves no word in doubt, 0 where it tells nothing, below 0 where it speaks
    against the caption. Without the division a long true caption would outscore every short one.
    Captions longer than the network's context are cut.
    """

    name = "alignment"
    model = "open_clip CoCa of miro fit-clip"
    reads_caption = True
    range = (-1.0, 1.0)

    def __init__(
        self, weights: str | None, options: RewardOptions | torch.device | str = "cpu"
    ) -> None:
        if weights is None:
            raise ValueError(
                "the alignment reward needs a fitted network: run `python -m openmoji fit-clip DATA "
                "FOLDER`, then pass openmoji.alignment:Alignment=FOLDER"
            )
        device = options.device if isinstance(options, RewardOptions) else options
        self._device = torch.device(device)
        self._model = load_captioner(Path(weights), self._device)
        self._habit: dict[str, Tensor] = {}

    @torch.inference_mode()
    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """float32 (B,), a share; NaN for a caption that says nothing."""
        scores = torch.empty(len(images), device=self._device)
        for indices, pixels in batches_by_size(images, captions, self._device):
            said: list[str] = [captions[int(i)] for i in indices]
            words = self._model.words(said)
            given = self._model.log_likelihoods(self._model.see(pixels), words)
            habit = self._without_picture(said).sum(1)
            # Nothing said divided by nothing is NaN: not known.
            scores[indices] = (given.sum(1) - habit) / -habit
        return scores

    def _without_picture(self, captions: Sequence[str]) -> Tensor:
        """What each caption scores with nothing to see; computed once for a distinct caption."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._habit]
        if new:
            if len(self._habit) > 100_000:
                self._habit.clear()
                new = list(dict.fromkeys(captions))
            found = self._model.without_picture(self._model.words(new))
            self._habit.update(zip(new, found.unbind(), strict=True))
        return torch.stack([self._habit[caption] for caption in captions])
