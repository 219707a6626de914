"""Adaptive layer norm, alone and fused with the gated residual before it.

    n  = (x − mean(x)) / sqrt(var(x) + eps)          over the channels D of each token
    h  = n · (1 + scale) + shift                     adaln
    x′ = x + gate · branch,  h = adaln(x′)           gated_residual_adaln

shift, scale and gate belong to a sample and are shared by its N tokens (DiT, arXiv 2212.09748,
section 3.2). Inputs are fp32, bf16 or fp16; the arithmetic is fp32, the results have x's dtype.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from miro_kernels._shapes import check_rank, check_shape, widen


def adaln_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(widen(x), x.shape[-1:], eps=eps)
    return (normed * (1 + widen(scale)[:, None]) + widen(shift)[:, None]).to(x.dtype)


def gated_residual_adaln_reference(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    # The sum is rounded to x's dtype before the norm, so that h is the norm of the x′ returned.
    x = (widen(x) + widen(gate)[:, None] * widen(branch)).to(x.dtype)
    return x, adaln_reference(x, shift, scale, eps)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift.

    Args:
        x: (B, N, D) tokens.
        shift, scale: (B, D), one row a sample.
        eps: added to the variance.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        ValueError: a shape does not fit; the message names the argument and the shape expected.
    """
    _check_modulation("adaln", x, shift=shift, scale=scale)
    return adaln_reference(x, shift, scale, eps)


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x′ = x + gate·branch and h = adaln(x′, shift, scale), in one pass.

    Args:
        x: (B, N, D) residual stream.
        branch: (B, N, D) output of the attention or of the MLP before it.
        gate, shift, scale: (B, D).
        eps: added to the variance.

    Returns:
        x′ and h, both (B, N, D) in x's dtype.

    Raises:
        ValueError: a shape does not fit; the message names the argument and the shape expected.
    """
    _check_modulation("gated_residual_adaln", x, gate=gate, shift=shift, scale=scale)
    check_shape("gated_residual_adaln", "branch", branch, tuple(x.shape), "(B, N, D)")
    return gated_residual_adaln_reference(x, branch, gate, shift, scale, eps)


def _check_modulation(op: str, x: Tensor, **modulation: Tensor) -> None:
    check_rank(op, "x", x, "B N D")
    for name, tensor in modulation.items():
        check_shape(op, name, tensor, (x.shape[0], x.shape[2]), "(B, D)")
