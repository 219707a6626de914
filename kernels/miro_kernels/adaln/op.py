"""The adaptive layer norms and their torch ops: `adaln` is `reward_adaln` without rewards.

Formulas: reference.py. Gradients, saved tensors and least bytes: kernels.py. Inputs are fp32, bf16
or fp16; the arithmetic is fp32, and outputs have x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miro_kernels._checks import (
    check_device,
    check_floats,
    check_integers,
    check_rank,
    check_shape,
)
from miro_kernels._triton import counts_no_flops
from miro_kernels.adaln import launcher
from miro_kernels.adaln.reference import (
    adaln_reference,
    gated_residual_adaln_reference,
    reward_adaln_reference,
)
from miro_kernels.backend import select_backend

# The ops take `modulation` as one (B, K, D) tensor or as K tensors (B, D), so that neither form is
# copied into the other, and `rewards` as [block, table, bins, keep] or as an empty list.


@torch.library.custom_op("miro::reward_adaln", mutates_args=())
def adaln_op(
    x: Tensor, modulation: list[Tensor], rewards: list[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """Return h, and the mean and rstd of the tokens."""
    _, h, stats = launcher.forward(x, None, modulation, rewards, eps)
    return h, stats


@torch.library.custom_op("miro::reward_gated_residual_adaln", mutates_args=())
def gated_op(
    x: Tensor, branch: Tensor, modulation: list[Tensor], rewards: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x′, h, and the mean and rstd of the tokens of x′."""
    residual, h, stats = launcher.forward(x, branch, modulation, rewards, eps)
    assert residual is not None
    return residual, h, stats


@torch.library.custom_op("miro::reward_adaln_backward", mutates_args=())
def adaln_backward_op(
    x: Tensor, modulation: list[Tensor], rewards: list[Tensor], dh: Tensor, stats: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the gradients of x, modulation, and [block, table]."""
    dx, _, dmodulation, dtables = launcher.backward(x, None, modulation, rewards, None, dh, stats)
    return dx, dmodulation, dtables


@torch.library.custom_op("miro::reward_gated_residual_adaln_backward", mutates_args=())
def gated_backward_op(
    residual: Tensor,
    branch: Tensor,
    modulation: list[Tensor],
    rewards: list[Tensor],
    dresidual: Tensor | None,
    dh: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return the gradients of x, branch, modulation, and [block, table]."""
    dx, dbranch, dmodulation, dtables = launcher.backward(
        residual, branch, modulation, rewards, dresidual, dh, stats
    )
    assert dbranch is not None
    return dx, dbranch, dmodulation, dtables


@adaln_op.register_fake
def _(x: Tensor, *others: Any) -> Any:
    return launcher.empty_outputs(x)


@gated_op.register_fake
def _(x: Tensor, *others: Any) -> Any:
    return x.new_empty(x.shape), *launcher.empty_outputs(x)


@adaln_backward_op.register_fake
def _(x: Tensor, modulation: list[Tensor], rewards: list[Tensor], *others: Any) -> Any:
    return x.new_empty(x.shape), _empty_like(modulation), _empty_like(rewards[:2])


@gated_backward_op.register_fake
def _(residual: Tensor, branch: Tensor, modulation: list, rewards: list, *others: Any) -> Any:
    return *_empty_like([residual, branch]), _empty_like(modulation), _empty_like(rewards[:2])


def _empty_like(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tokens, modulation, rewards, _ = inputs
    if len(tokens) == 2:  # x′, which was normalised, replaces x
        tokens[0] = output[0]
    ctx.save_for_backward(*tokens, *modulation, *rewards, output[-1])
    ctx.lengths = len(tokens), len(modulation)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    *dresidual, dh, _ = grads
    *saved, stats = ctx.saved_tensors
    n_tokens, n_modulation = ctx.lengths
    tokens, modulation = saved[:n_tokens], saved[n_tokens:][:n_modulation]
    rewards = saved[n_tokens + n_modulation :]
    dh = torch.zeros_like(tokens[0]) if dh is None else dh
    op = gated_backward_op if dresidual else adaln_backward_op
    *gradients, dtables = op(*tokens, modulation, rewards, *dresidual, dh, stats)
    # bins, keep and eps have no gradient.
    return *gradients, [*dtables, None, None] if rewards else [], None


adaln_op.register_autograd(_differentiate, setup_context=_save)
gated_op.register_autograd(_differentiate, setup_context=_save)
for _name in ("reward_adaln", "reward_gated_residual_adaln"):
    counts_no_flops(_name, f"{_name}_backward")


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute LN(x)·(1 + scale) + shift.

    Args:
        x: (B, N, D) tokens.
        shift: (B, D).
        scale: (B, D).
        eps: added to the variance.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        ValueError: if an argument's shape, dtype or device does not fit, or if the backend is set
            to one that cannot run; the message names the argument, the expected and actual value.
    """
    _check_rows("adaln", x, shift=shift, scale=scale)
    if select_backend("adaln", x, launcher.unsupported_channels(x)) == "triton":
        return adaln_op(x, [shift, scale], [], eps)[0]
    return adaln_reference(x, shift, scale, eps)


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Compute x′ = x + gate·branch and h = adaln(x′, shift, scale) in one pass.

    Args:
        x: (B, N, D) residual stream.
        branch: (B, N, D) output of the attention or MLP before it.
        gate: (B, D).
        shift: (B, D).
        scale: (B, D).
        eps: added to the variance.

    Returns:
        x′ and h, both (B, N, D) in x's dtype.

    Raises:
        ValueError: as `adaln`.
    """
    op = "gated_residual_adaln"
    _check_rows(op, x, gate=gate, shift=shift, scale=scale)
    check_shape(op, "branch", branch, tuple(x.shape), "(B, N, D)")
    check_floats(op, x=x, branch=branch)
    if select_backend(op, x, launcher.unsupported_channels(x)) == "triton":
        return gated_op(x, branch, [gate, shift, scale], [], eps)[:2]
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
    """Compute `adaln`, or `gated_residual_adaln`, modulated by time, block and rewards.

    The modulation m[b] = base[b] + block + Σ_r keep[b, r] · table[r, bins[b, r]] is summed in
    registers and never stored.

    Args:
        x: (B, N, D) tokens.
        base: (B, K, D) modulation from time and text, which all blocks share: K = 2 (shift, scale),
            or 3 (gate, shift, scale) with a branch.
        block: (K, D) offset of this block.
        table: (R, L, K, D) modulation of R rewards in L bins; R may be 0.
        bins: (B, R) integers in [0, L), the bin of each reward. The range is checked on a CPU; on a
            GPU, to avoid a sync, a bin out of range gives NaN for its sample if keep is set.
        keep: (B, R) bool or 0/1; where 0 the reward is missing or dropped and adds nothing.
        eps: added to the variance.
        branch: (B, N, D) output of the layer before, added to x with the gate; or None.

    Returns:
        h (B, N, D), or with a branch x′ and h; in x's dtype.

    Raises:
        ValueError: as `adaln`.
    """
    op = "reward_adaln"
    check_rank(op, "x", x, "B N D")
    check_rank(op, "table", table, "R L K D")
    parts = 2 if branch is None else 3
    batch, _, channels = x.shape
    rewards, n_bins = table.shape[:2]
    check_shape(op, "base", base, (batch, parts, channels), "(B, K, D)")
    check_shape(op, "block", block, (parts, channels), "(K, D)")
    check_shape(op, "table", table, (rewards, n_bins, parts, channels), "(R, L, K, D)")
    check_shape(op, "bins", bins, (batch, rewards), "(B, R)")
    check_shape(op, "keep", keep, (batch, rewards), "(B, R)")
    if branch is not None:
        check_shape(op, "branch", branch, tuple(x.shape), "(B, N, D)")
        check_floats(op, x=x, branch=branch)
    check_floats(op, x=x, base=base, block=block, table=table)
    check_integers(op, "bins", bins)
    check_device(op, "bins", bins, "x", x)
    check_device(op, "keep", keep, "x", x)
    if select_backend(op, x, launcher.unsupported_channels(x)) == "triton":
        tables = [block, table, bins, keep]
        if branch is None:
            return adaln_op(x, [base], tables, eps)[0]
        return gated_op(x, branch, [base], tables, eps)[:2]
    return reward_adaln_reference(x, base, block, table, bins, keep, eps, branch)


def _check_rows(op: str, x: Tensor, **rows: Tensor) -> None:
    check_rank(op, "x", x, "B N D")
    for name, row in rows.items():
        check_shape(op, name, row, (x.shape[0], x.shape[2]), "(B, D)")
    check_floats(op, x=x, **rows)
