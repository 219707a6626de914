"""Rendering of scenes: sprites on a background, then degradations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openmoji.compositions import Scene
from openmoji.sprites import BACKGROUNDS, LUMA, sprite_bank

SIZE = 32  # default width and height in pixels


@dataclass(frozen=True)
class Degradation:
    """Degradations of an image, applied in this order; the defaults do nothing."""

    blur: float = 0.0  # standard deviation of a Gaussian, in 1/32 of the image width
    saturation: float = 1.0  # 0: gray
    contrast: float = 1.0  # 0: the image's mean
    noise: float = 0.0  # standard deviation, with pixels in [0, 1]
    noise_seed: int = 0


def render(
    scenes: Sequence[Scene], degradations: Sequence[Degradation], size: int = SIZE
) -> np.ndarray:
    """Render scenes with their degradations.

    Returns:
        uint8 (B, size, size, 3), sRGB.

    Raises:
        ValueError: `size` is not a positive multiple of 8, so objects would not align with pixels.
    """
    if size <= 0 or size % 8:
        raise ValueError(f"size is {size} pixels; give a positive multiple of 8")
    batch = np.stack([_compose(scene, size) for scene in scenes])
    degraded = _degrade(batch, degradations)
    return np.rint(np.clip(degraded, 0, 1) * 255).astype(np.uint8)


def _compose(scene: Scene, size: int) -> np.ndarray:
    """The clean image: float32 (size, size, 3) in [0, 1]."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        width = round(item.width * size)
        left, top = (round(center * size - width / 2) for center in (item.x, item.y))
        sprite = sprite_bank(width)[item.concept, item.tint]
        region = image[top : top + width, left : left + width]
        region[:] = region * (1 - sprite[..., 3:]) + sprite[..., :3]
    return image


def _degrade(batch: np.ndarray, degradations: Sequence[Degradation]) -> np.ndarray:
    """Degrade float32 (B, size, size, 3) images, without clipping."""
    size = batch.shape[1]

    def column(name: str) -> np.ndarray:
        return np.array([getattr(d, name) for d in degradations], np.float32)[:, None, None, None]

    blur = _blur_matrices(column("blur").reshape(-1) * (size / SIZE), size)
    channels = batch.transpose(0, 3, 1, 2)
    channels = blur[:, None] @ channels @ blur[:, None].transpose(0, 1, 3, 2)
    batch = np.ascontiguousarray(channels.transpose(0, 2, 3, 1))
    gray = (batch @ LUMA)[..., None]
    batch = gray + (batch - gray) * column("saturation")
    mean = batch.mean((1, 2, 3), keepdims=True)
    batch = mean + (batch - mean) * column("contrast")
    for image, degradation in zip(batch, degradations, strict=True):
        if degradation.noise:
            rng = np.random.default_rng(degradation.noise_seed)
            noise = rng.standard_normal(image.shape, np.float32)
            image += noise * np.float32(degradation.noise)
    return batch


def _blur_matrices(sigmas: np.ndarray, size: int) -> np.ndarray:
    """Gaussian blur along one axis as float32 (B, size, size); sigma 0 is the identity.

    Rows sum to one: weights are renormalized at the border instead of padding with black.
    """
    distance = np.subtract.outer(np.arange(size), np.arange(size)).astype(np.float32)
    variance = np.maximum(sigmas, 1e-2)[:, None, None] ** 2
    weights = np.exp(-(distance**2) / (2 * variance))
    return weights / weights.sum(-1, keepdims=True)
