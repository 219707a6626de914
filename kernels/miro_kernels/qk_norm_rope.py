"""Per-head RMS norm of queries and keys, then rotary position embedding, in one pass.

    n = x / sqrt(mean(x²) + eps) · weight                       over the channels of each head
    (a, b) → (a·cos − b·sin, a·sin + b·cos)                     a, b: first and second half of n

The norm keeps attention logits bounded (arXiv 2302.05442), the rotation encodes the place of an
image token (RoFormer, arXiv 2104.09864; the angles of a 2-D grid are the caller's).
"""

from __future__ import annotations

import torch
from torch import Tensor

from miro_kernels._shapes import check_rank, check_shape, widen

EPS = 1e-6


def rms_norm_reference(x: Tensor, weight: Tensor) -> Tensor:
    wide = widen(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * widen(weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = widen(cos)[:, None], widen(sin)[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    rotated_q = _rotate(rms_norm_reference(q, q_weight), cos, sin)
    rotated_k = _rotate(rms_norm_reference(k, k_weight), cos, sin)
    return rotated_q.to(q.dtype), rotated_k.to(k.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMS-normalise q and k over each head and rotate them.

    Args:
        q, k: (B, N, heads, head size).
        q_weight, k_weight: (head size,).
        cos, sin: (N, head size / 2), the rotation of each token.

    Returns:
        q and k, same shapes and dtypes.

    Raises:
        ValueError: a shape does not fit; the message names the argument and the shape expected.
    """
    op = "qk_norm_rope"
    check_rank(op, "q", q, "B N heads head_size")
    _, tokens, _, size = q.shape
    if size % 2:
        raise ValueError(f"{op}: the head size must be even to be rotated, got {size}")
    check_shape(op, "k", k, tuple(q.shape), "(B, N, heads, head size)")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_shape(op, name, weight, (size,), "(head size,)")
    for name, angle in (("cos", cos), ("sin", sin)):
        check_shape(op, name, angle, (tokens, size // 2), "(N, head size / 2)")
    return qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin)
