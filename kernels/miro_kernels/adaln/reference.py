"""Adaptive layer norm in plain torch: the specification, the CPU path and the tests' oracle.

    n  = (x − mean(x)) / sqrt(var(x) + eps)          over the channels D of each token
    h  = n · (1 + scale) + shift                     adaln
    x′ = x + gate · branch,  h = adaln(x′)           gated_residual_adaln

shift, scale and gate belong to a sample and are shared by its N tokens (DiT, arXiv 2212.09748,
section 3.2). `reward_adaln` sums them from time, block and rewards:

    m[b] = base[b] + block + Σ_r keep[b, r] · table[r, bins[b, r]]        (K, D)

with m = (shift, scale) for K = 2 and m = (gate, shift, scale) for K = 3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from miro_kernels._checks import widen


def adaln_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute `adaln` in plain torch."""
    normed = F.layer_norm(widen(x), x.shape[-1:], eps=eps)
    return (normed * (1 + widen(scale)[:, None]) + widen(shift)[:, None]).to(x.dtype)


def gated_residual_adaln_reference(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `gated_residual_adaln` in plain torch."""
    # Round x′ to x's dtype before the norm, so that h is the norm of the x′ returned.
    x = (widen(x) + widen(gate)[:, None] * widen(branch)).to(x.dtype)
    return x, adaln_reference(x, shift, scale, eps)


def reward_modulation_reference(
    base: Tensor, block: Tensor, table: Tensor, bins: Tensor, keep: Tensor
) -> Tensor:
    """Sum the modulation m (B, K, D) in fp32, or fp64 if the arguments are."""
    rewards, n_bins = table.shape[:2]
    # A product with one-hot rows is a gather whose gradient is a matmul instead of a scatter-add.
    one_hot = F.one_hot(bins.long(), n_bins).to(table.dtype) * keep.to(table.dtype)[..., None]
    added = one_hot.reshape(len(bins), rewards * n_bins) @ table.flatten(2).flatten(0, 1)
    return widen(base) + widen(block) + widen(added.view_as(base))


def reward_adaln_reference(
    x: Tensor,
    base: Tensor,
    block: Tensor,
    table: Tensor,
    bins: Tensor,
    keep: Tensor,
    eps: float,
    branch: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `reward_adaln` in plain torch."""
    modulation = reward_modulation_reference(base, block, table, bins, keep)
    if branch is None:
        shift, scale = modulation.unbind(1)
        return adaln_reference(x, shift, scale, eps)
    gate, shift, scale = modulation.unbind(1)
    return gated_residual_adaln_reference(x, branch, gate, shift, scale, eps)
