"""The gated activation of the MLP: silu(a)·b, a and b the halves of one projection.

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from miro_kernels._shapes import widen


def swiglu_reference(packed: Tensor) -> Tensor:
    gate, value = packed.chunk(2, -1)
    return (F.silu(widen(gate)) * widen(value)).to(packed.dtype)


def swiglu(packed: Tensor) -> Tensor:
    """silu(a)·b for packed = [a, b].

    Args:
        packed: (..., 2F), both halves from one matrix product.

    Returns:
        (..., F) in packed's dtype.

    Raises:
        ValueError: the last dimension of packed is odd.
    """
    if packed.shape[-1] % 2:
        raise ValueError(f"swiglu: packed's last dimension must be even, got {packed.shape[-1]}")
    return swiglu_reference(packed)
