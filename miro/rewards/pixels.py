"""Rewards that need no weights: they look at the pixels alone and never read the caption."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from miro.rewards.base import same_sized


class Colourfulness:
    """How colourful a picture is, after Hasler and Süsstrunk 2003 (their metric M̂⁽³⁾).

    With rg = R − G and yb = (R + G)/2 − B over the pixels, channels from 0 to 255:

        M = √(σ²(rg) + σ²(yb)) + 0.3·√(μ²(rg) + μ²(yb))

    0 for a grey picture; the paper calls 15 slightly, 45 quite and 109 extremely colourful.
    Source: Hasler and Süsstrunk, Measuring colorfulness in natural images, SPIE 5007, 2003.
    """

    name = "colourfulness"
    model = "Hasler and Süsstrunk 2003"
    reads_caption = False
    range = (0.0, 110.0)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """float32 (B,), in the units of the channels (0 to 255)."""
        return _score_by_size(images, captions, self._device, _colourfulness)


class Sharpness:
    """How far a picture's edges stand out from its noise, in nepers (natural log of a ratio).

    Let y be the luma (Rec. 601) from 0 to 1. On every 2×2 block of pixels take Roberts' cross,

        g = √((y₁₁ − y₀₀)² + (y₁₀ − y₀₁)²) / √2,

    and of all g of the picture: s, the mean of the strongest tenth (its edges), and w, the mean of
    the weaker half (its flat parts). The score is

        ln((e + 0.02) / (w + 0.02)),    e = √max(0, s² − (3.487·w)²).

    Blur and lost contrast lower s. Noise raises s and w together, and that is why a plain Laplacian
    variance, which knows s only, prefers noisy pictures. Under Gaussian noise alone g follows a
    Rayleigh law (the two diagonals share no pixel, so they are independent), for which s = 3.487·w;
    e is what the edges have beyond it. The 0.02, five grey levels, is the step below which an
    edge counts as flat; it keeps the score finite and puts a constant picture at 0.

    About 3 for crisp drawings, 1 to 2 for photographs, near 0 for blur, negative for noise alone.
    A picture covered by fine texture scores low: what is everywhere cannot be told from noise.
    """

    name = "sharpness"
    model = "edges over noise, miro.rewards.pixels"
    reads_caption = False
    range = (-1.0, 3.5)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """float32 (B,); 0 for a picture too small (one row or column) to hold a gradient."""
        return _score_by_size(images, captions, self._device, _sharpness)


def _score_by_size(
    images: Sequence[Tensor],
    captions: Sequence[str],
    device: torch.device,
    function: Callable[[Tensor], Tensor],
) -> Tensor:
    """Applies a function of uint8 (b, 3, H, W) to stacks of equally large images."""
    scores = torch.full((len(images),), math.nan, device=device)
    for indices, pixels in same_sized(images, captions, device):
        scores[indices] = function(pixels).float()
    return scores


def _colourfulness(pixels: Tensor) -> Tensor:
    """float64 (b,). Moments are sums of integers: exact, so equal in any batch, on any device."""
    red, green, blue = pixels.flatten(2).to(torch.int64).unbind(1)
    red_green, yellow_blue = red - green, red + green - 2 * blue  # the second is 2·yb
    rg_mean, rg_variance = _moments(red_green)
    yb_mean, yb_variance = _moments(yellow_blue)
    spread = (rg_variance + yb_variance / 4).sqrt()
    return spread + 0.3 * (rg_mean**2 + yb_mean**2 / 4).sqrt()


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of int64 (b, n) along n, float64 (b,) each."""
    mean = values.sum(1).double() / values.shape[1]
    square = (values * values).sum(1).double() / values.shape[1]
    return mean, (square - mean**2).clamp_min(0)


_NOISE_RATIO = (
    3.487  # s/w of a Rayleigh law: mean of its strongest tenth over that of its weaker half
)
_STEP = 0.02


def _sharpness(pixels: Tensor) -> Tensor:
    """float64 (b,): in doubles, so that the order of a sum never shows in the float32 score."""
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
