"""Adaptive layer norm whose modulation is summed on the fly from time, block and rewards.

    m[b] = base[b] + block + Σ_r keep[b, r] · table[r, bins[b, r]]        (K, D)

K = 2: m = (shift, scale) and h = adaln(x, shift, scale).
K = 3: m = (gate, shift, scale) and x′, h = gated_residual_adaln(x, branch, gate, shift, scale).

`base` is shared by all blocks and comes from time and text, `block` is the block's own offset, and
`table` holds what each reward adds at each of its levels. A reward that is not known, or dropped,
has keep 0 and adds nothing. The sum never exists in memory in the kernels (norm_kernels.py).

    dbase[b] = dm[b]    dblock = Σ_b dm[b]    dtable[r, l] = Σ_b keep[b, r] · [bins[b, r] = l] dm[b]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miro_kernels import backend, norm_launch
from miro_kernels._shapes import (
    check_device,
    check_floats,
    check_integers,
    check_rank,
    check_shape,
    widen,
)
from miro_kernels._triton import counts_no_flops
from miro_kernels.adaln import adaln_reference, gated_residual_adaln_reference
from miro_kernels.norm_launch import Rewards


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


@torch.library.custom_op("miro::reward_adaln", mutates_args=())
def _reward_adaln(
    x: Tensor, base: Tensor, block: Tensor, table: Tensor, bins: Tensor, keep: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """h, and mean and rstd of the rows."""
    shift, scale = base.unbind(1)
    rewards = Rewards(block, table, bins, keep)
    _, h, stats = norm_launch.forward(x, None, None, shift, scale, rewards, eps)
    return h, stats


@torch.library.custom_op("miro::reward_gated_residual_adaln", mutates_args=())
def _reward_gated(
    x: Tensor,
    branch: Tensor,
    base: Tensor,
    block: Tensor,
    table: Tensor,
    bins: Tensor,
    keep: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x′, h, and mean and rstd of the rows of x′."""
    gate, shift, scale = base.unbind(1)
    rewards = Rewards(block, table, bins, keep)
    total, h, stats = norm_launch.forward(x, branch, gate, shift, scale, rewards, eps)
    assert total is not None
    return total, h, stats


@torch.library.custom_op("miro::reward_adaln_backward", mutates_args=())
def _reward_adaln_backward(
    x: Tensor,
    base: Tensor,
    block: Tensor,
    table: Tensor,
    bins: Tensor,
    keep: Tensor,
    dh: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, base, block and table."""
    rewards = Rewards(block, table, bins, keep)
    dx, _, partials = norm_launch.backward(x, None, dh, None, None, base[:, 1], rewards, stats)
    return dx, *norm_launch.fold_rewards(partials, base, rewards)


@torch.library.custom_op("miro::reward_gated_residual_adaln_backward", mutates_args=())
def _reward_gated_backward(
    total: Tensor,
    branch: Tensor,
    base: Tensor,
    block: Tensor,
    table: Tensor,
    bins: Tensor,
    keep: Tensor,
    dtotal: Tensor | None,
    dh: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, base, block and table."""
    rewards = Rewards(block, table, bins, keep)
    dx, dbranch, partials = norm_launch.backward(
        total, branch, dh, dtotal, base[:, 0], base[:, 2], rewards, stats
    )
    assert dbranch is not None
    return dx, dbranch, *norm_launch.fold_rewards(partials, base, rewards)


@_reward_adaln.register_fake
def _(x: Tensor, *others: Any) -> Any:
    return norm_launch.results(x)


@_reward_gated.register_fake
def _(x: Tensor, *others: Any) -> Any:
    return x.new_empty(x.shape), *norm_launch.results(x)


@_reward_adaln_backward.register_fake
def _(x: Tensor, base: Tensor, block: Tensor, table: Tensor, *others: Any) -> Any:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, base, block, table))


@_reward_gated_backward.register_fake
def _(total: Tensor, branch: Tensor, base: Tensor, block: Tensor, table: Tensor, *_: Any) -> Any:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (total, branch, base, block, table))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # What was normed, and its statistics: x and h's, or x′ and x′'s.
    normed = inputs[0] if len(output) == 2 else output[0]
    ctx.save_for_backward(normed, *inputs[1:-1], output[-1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dh: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *saved, stats = ctx.saved_tensors
    if dh is None:
        return (None,) * 7
    return *_reward_adaln_backward(*saved, dh, stats), None, None, None


def _differentiate_gated(
    ctx: Any, dtotal: Tensor | None, dh: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    *saved, stats = ctx.saved_tensors
    dh = torch.zeros_like(saved[0]) if dh is None else dh
    return *_reward_gated_backward(*saved, dtotal, dh, stats), None, None, None


_reward_adaln.register_autograd(_differentiate, setup_context=_save)
_reward_gated.register_autograd(_differentiate_gated, setup_context=_save)
counts_no_flops(_reward_adaln, _reward_adaln_backward, _reward_gated, _reward_gated_backward)


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
        bins: (B, R) integers in [0, L), the level of each reward. On a GPU, where a check would
            wait for the device, a known reward's level outside makes its sample NaN.
        keep: (B, R) bool or 0/1; where 0 the reward is not known and adds nothing.
        eps: added to the variance.
        branch: (B, N, D) output of the layer before, added to x with the gate; or None.

    Returns:
        h (B, N, D), or with a branch x′ and h; in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend asked for cannot be had;
            the message names the argument, what was expected and what was got.
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
        check_floats(op, x=x, branch=branch)
    check_floats(op, x=x, base=base, block=block, table=table)
    check_integers(op, "bins", bins)
    check_device(op, "bins", bins, "x", x)
    check_device(op, "keep", keep, "x", x)
    if backend.chosen(op, x, norm_launch.unsupported(x)) == "triton":
        if branch is None:
            return _reward_adaln(x, base, block, table, bins, keep, eps)[0]
        return _reward_gated(x, branch, base, block, table, bins, keep, eps)[:2]
    return reward_adaln_reference(x, base, block, table, bins, keep, eps, branch)
