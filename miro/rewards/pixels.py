"""Rewards computed from pixels alone, without weights and without the caption."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from miro.rewards.base import RewardOptions, batches_by_size


class _PixelReward:
    """Scores stacks of images of one size by `_score`."""

    name: str
    reads_caption = False

    def __init__(self, weights: str | None = None, options: RewardOptions | None = None) -> None:
        if weights is not None:
            raise ValueError(
                f"the reward {self.name!r} has no weights; give {self.name!r} without {weights!r}"
            )
        self._device = torch.device("cpu" if options is None else options.device)

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        scores = torch.full((len(images),), math.nan, device=self._device)
        for indices, pixels in batches_by_size(images, captions, self._device):
            scores[indices] = self._score(pixels).float()
        return scores

    def _score(self, pixels: Tensor) -> Tensor:
        """Scores (b,) of uint8 (b, 3, H, W)."""
        raise NotImplementedError


class Colourfulness(_PixelReward):
    """The colourfulness metric M̂⁽³⁾ of Hasler and Süsstrunk.

    With rg = R − G and yb = (R + G)/2 − B over the pixels, channels from 0 to 255:

        M = √(σ²(rg) + σ²(yb)) + 0.3·√(μ²(rg) + μ²(yb))

    0 for a grey image; the paper calls 15 slightly, 45 quite and 109 extremely colourful.
    Source: Hasler and Süsstrunk, Measuring colorfulness in natural images, SPIE 5007, 2003.
    """

    name = "colourfulness"
    model = "Hasler and Süsstrunk 2003"

    def _score(self, pixels: Tensor) -> Tensor:
        # Moments are sums of integers: exact, hence equal in any batch and on any device.
        red, green, blue = pixels.flatten(2).to(torch.int64).unbind(1)
        red_green, yellow_blue = red - green, red + green - 2 * blue  # the second is 2·yb
        rg_mean, rg_variance = _moments(red_green)
        yb_mean, yb_variance = _moments(yellow_blue)
        spread = (rg_variance + yb_variance / 4).sqrt()
        return spread + 0.3 * (rg_mean**2 + yb_mean**2 / 4).sqrt()


class Sharpness(_PixelReward):
    """Log ratio of edge strength to noise, in nepers.

    Let y be the luma (Rec. 601) from 0 to 1. On every 2×2 block of pixels take Roberts' cross,

        g = √((y₁₁ − y₀₀)² + (y₁₀ − y₀₁)²) / √2,

    and of all g of the image: s, the mean of the largest tenth (its edges), and w, the mean of the
    smaller half (its flat parts). The score is

        ln((e + 0.02) / (w + 0.02)),    e = √max(0, s² − (3.487·w)²).

    Blur and low contrast lower s. Noise raises both s and w; a Laplacian variance, which measures s
    alone, therefore prefers noisy images. Under Gaussian noise alone g is Rayleigh distributed (the
    two diagonals share no pixel, so they are independent) and s = 3.487·w; e is the edge strength
    beyond that. The constant 0.02, five grey levels, keeps the score finite and gives a constant
    image a score of 0.

    About 3 for crisp drawings, 1 to 2 for photographs, near 0 for blur, negative for noise alone.
    An image covered by fine texture scores low: uniform texture is indistinguishable from noise.
    An image of one row or column has no gradient and scores 0.
    """

    name = "sharpness"
    model = "edges over noise, miro.rewards.pixels"

    def _score(self, pixels: Tensor) -> Tensor:
        # In float64, so that the order of summation does not show in the float32 score.
        weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=pixels.device)
        luma = (pixels.movedim(1, -1).double() @ weights) / 255  # (b, H, W)
        falling = luma[:, 1:, 1:] - luma[:, :-1, :-1]
        rising = luma[:, 1:, :-1] - luma[:, :-1, 1:]
        gradient = (((falling**2 + rising**2) / 2).sqrt()).flatten(1).sort(1).values
        count = gradient.shape[1]
        if count == 0:
            return luma.new_zeros(len(luma))
        strong = gradient[:, -math.ceil(count / 10) :].mean(1)
        weak = gradient[:, : math.ceil(count / 2)].mean(1)
        edges = (strong**2 - (_NOISE_RATIO * weak) ** 2).clamp_min(0).sqrt()
        return ((edges + _STEP) / (weak + _STEP)).log()


_NOISE_RATIO = 3.487  # s/w of a Rayleigh distribution
_STEP = 0.02


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of int64 (b, n) along n, float64 (b,) each."""
    mean = values.sum(1).double() / values.shape[1]
    square = (values * values).sum(1).double() / values.shape[1]
    return mean, (square - mean**2).clamp_min(0)
