"""Deterministic weights and images, derived from names, for both sides of a comparison.

The published packages cannot be installed beside this one, and the published weights are gigabytes,
so each side generates the same random weights. Imports torch alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def _generator(name: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.Generator().manual_seed(seed)


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """The float32 weight of a published name and shape.

    Matrices and kernels preserve the scale of activations, rows of embeddings have length 1, norm
    weights are about 1, biases are small: every tensor affects the score.
    """
    noise = torch.randn(tuple(shape), generator=_generator(name))
    if name.endswith("bias"):
        return 0.1 * noise
    if len(shape) < 2:
        return 1 + 0.1 * noise
    fan_in = math.prod(shape[1:]) if shape[0] > 1 else shape[-1]
    return noise / math.sqrt(fan_in)


def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of the same names and shapes with generated weights; integers are unchanged."""
    return {
        name: weight(name, tensor.shape) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def image(name: str, height: int, width: int) -> Tensor:
    """uint8 (3, height, width): coloured squares of 16 pixels with a little noise."""
    generator = _generator(name)
    down, across = -(-height // 16), -(-width // 16)
    squares = torch.randint(16, 240, (3, down, across), generator=generator)
    noise = torch.randint(-16, 16, (3, height, width), generator=generator)
    large = squares.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return (large[:, :height, :width] + noise).to(torch.uint8)
