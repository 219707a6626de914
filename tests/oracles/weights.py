"""Weights and pictures that both sides of a comparison make alike, from names alone.

The published packages and ours run in environments that exclude each other, and the published
weights are gigabytes: so each side makes random ones by this rule. Imports torch alone.
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
    """The float32 weight that a tensor of this published name and shape has.

    Matrices and kernels keep the scale of what they multiply, rows of embeddings have length 1,
    norms scale by about 1, biases are small: so every tensor shows in the result.
    """
    noise = torch.randn(tuple(shape), generator=_generator(name))
    if name.endswith("bias"):
        return 0.1 * noise
    if len(shape) < 2:
        return 1 + 0.1 * noise
    fan_in = math.prod(shape[1:]) if shape[0] > 1 else shape[-1]
    return noise / math.sqrt(fan_in)


def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of the same names and shapes with weights by the rule; integers stay."""
    return {
        name: weight(name, tensor.shape) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def picture(name: str, height: int, width: int) -> Tensor:
    """uint8 (3, height, width): coloured squares of 16 pixels under a little noise."""
    generator = _generator(name)
    down, across = -(-height // 16), -(-width // 16)
    squares = torch.randint(16, 240, (3, down, across), generator=generator)
    noise = torch.randint(-16, 16, (3, height, width), generator=generator)
    large = squares.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return (large[:, :height, :width] + noise).to(torch.uint8)
