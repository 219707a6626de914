"""Adaptive layer norm whose modulation is summed on the fly from time, block and rewards.

    m[b] = base[b] + block + Σ_r keep[b, r] · table[r, bins[b, r]]        (K, D)

K = 2: m = (shift, scale) and h = adaln(x, shift, scale).
K = 3: m = (gate, shift, scale) and x′, h = gated_residual_adaln(x, branch, gate, shift, scale).

`base` is shared by all blocks and comes from time and text, `block` is the block's own offset, and
`table` holds what each reward adds at each of its levels. A reward that is not known, or dropped,
has keep 0 and adds nothing. The sum never exists in memory in a fused kernel.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from miro_kernels._shapes import check_rank, check_shape, widen
from miro_kernels.adaln import adaln_reference, gated_residual_adaln_reference


def reward_modulation_reference(
    base: Tensor, block: Tensor, table: Tensor, bins: Tensor, keep: Tensor
) -> Tensor:
    rewards, levels = table.shape[:2]
    # A product with one-hot rows is a gather whose gradient is a matmul: no scattered adds.
    chosen = F.one_hot(bins.long(), levels).to(table.dtype) * keep.to(table.dtype)[..., None]
    added = chosen.reshape(len(bins), rewards * levels) @ table.flatten(2).flatten(0, 1)
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
    modulation = reward_modulation_reference(base, block, table, bins, keep)
    if branch is None:
        shift, scale = modulation.unbind(1)
        return adaln_reference(x, shift, scale, eps)
    gate, shift, scale = modulation.unbind(1)
    return gated_residual_adaln_reference(x, branch, gate, shift, scale, eps)


def reward_adaln(
    x: Tensor,
    base: Tensor,
    block: Tensor,
    table: Tensor,
    bins: Tensor,
    keep: Tensor,
    eps: float = 1e-6,
    branch: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """adaln or, with a `branch`, gated_residual_adaln, modulated by time, block and rewards.

    Args:
        x: (B, N, D) tokens.
        base: (B, K, D) with K = 2 (shift, scale), or 3 (gate, shift, scale) with a branch.
        block: (K, D) offset of this block.
        table: (R, L, K, D) modulation of R rewards at L levels; R may be 0.
        bins: (B, R) integers in [0, L), the level of each reward.
        keep: (B, R) bool or 0/1; where 0 the reward is not known and adds nothing.
        eps: added to the variance.
        branch: (B, N, D) output of the layer before, added to x with the gate; or None.

    Returns:
        h (B, N, D), or with a branch x′ and h; in x's dtype.

    Raises:
        ValueError: a shape does not fit; the message names the argument and the shape expected.
    """
    op = "reward_adaln"
    check_rank(op, "x", x, "B N D")
    check_rank(op, "table", table, "R L K D")
    parts = 2 if branch is None else 3
    batch, _, channels = x.shape
    rewards, levels = table.shape[:2]
    check_shape(op, "base", base, (batch, parts, channels), "(B, K, D)")
    check_shape(op, "block", block, (parts, channels), "(K, D)")
    check_shape(op, "table", table, (rewards, levels, parts, channels), "(R, L, K, D)")
    check_shape(op, "bins", bins, (batch, rewards), "(B, R)")
    check_shape(op, "keep", keep, (batch, rewards), "(B, R)")
    if branch is not None:
        check_shape(op, "branch", branch, tuple(x.shape), "(B, N, D)")
    return reward_adaln_reference(x, base, block, table, bins, keep, eps, branch)
