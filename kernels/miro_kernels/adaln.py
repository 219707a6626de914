"""Adaptive layer norm, alone and fused with the gated residual before it.

    n  = (x − mean(x)) / sqrt(var(x) + eps)          over the channels D of each token
    h  = n · (1 + scale) + shift                     adaln
    x′ = x + gate · branch,  h = adaln(x′)           gated_residual_adaln

shift, scale and gate belong to a sample and are shared by its N tokens (DiT, arXiv 2212.09748,
section 3.2). Inputs are fp32, bf16 or fp16; the arithmetic is fp32, the results have x's dtype.
Gradients, bytes and what is saved: norm_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miro_kernels import backend, norm_launch
from miro_kernels._shapes import check_floats, check_rank, check_shape, widen
from miro_kernels._triton import counts_no_flops


def adaln_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(widen(x), x.shape[-1:], eps=eps)
    return (normed * (1 + widen(scale)[:, None]) + widen(shift)[:, None]).to(x.dtype)


def gated_residual_adaln_reference(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    # The sum is rounded to x's dtype before the norm, so that h is the norm of the x′ returned.
    x = (widen(x) + widen(gate)[:, None] * widen(branch)).to(x.dtype)
    return x, adaln_reference(x, shift, scale, eps)


@torch.library.custom_op("miro::adaln", mutates_args=())
def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h, and mean and rstd of the rows."""
    _, h, stats = norm_launch.forward(x, None, None, shift, scale, None, eps)
    return h, stats


@torch.library.custom_op("miro::adaln_backward", mutates_args=())
def _adaln_backward(
    x: Tensor, scale: Tensor, dh: Tensor, stats: Tensor, shift_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale."""
    dx, _, partials = norm_launch.backward(x, None, dh, None, None, scale, None, stats)
    dshift, dscale = scale.new_empty(scale.shape, dtype=shift_dtype), scale.new_empty(scale.shape)
    norm_launch.fold(partials, None, dshift, dscale)
    return dx, dshift, dscale


@torch.library.custom_op("miro::gated_residual_adaln", mutates_args=())
def _gated(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x′, h, and mean and rstd of the rows of x′."""
    total, h, stats = norm_launch.forward(x, branch, gate, shift, scale, None, eps)
    assert total is not None
    return total, h, stats


@torch.library.custom_op("miro::gated_residual_adaln_backward", mutates_args=())
def _gated_backward(
    total: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    dtotal: Tensor | None,
    dh: Tensor,
    stats: Tensor,
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, gate, shift and scale."""
    dx, dbranch, partials = norm_launch.backward(
        total, branch, dh, dtotal, gate, scale, None, stats
    )
    assert dbranch is not None
    dgate, dscale = gate.new_empty(gate.shape), scale.new_empty(scale.shape)
    dshift = scale.new_empty(scale.shape, dtype=shift_dtype)
    norm_launch.fold(partials, dgate, dshift, dscale)
    return dx, dbranch, dgate, dshift, dscale


@_adaln.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return norm_launch.results(x)


@_adaln_backward.register_fake
def _(x: Tensor, scale: Tensor, dh: Tensor, stats: Tensor, shift_dtype: torch.dtype) -> Any:
    dshift = scale.new_empty(scale.shape, dtype=shift_dtype)
    return x.new_empty(x.shape), dshift, scale.new_empty(scale.shape)


@_gated.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Any:
    return x.new_empty(x.shape), *norm_launch.results(x)


@_gated_backward.register_fake
def _(
    total: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    dtotal: Tensor | None,
    dh: Tensor,
    stats: Tensor,
    shift_dtype: torch.dtype,
) -> Any:
    like = (tensor.new_empty(tensor.shape) for tensor in (total, branch, gate))
    dshift = scale.new_empty(scale.shape, dtype=shift_dtype)
    return *like, dshift, scale.new_empty(scale.shape)


def _save_adaln(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, _ = inputs
    ctx.save_for_backward(x, scale, output[1])
    ctx.shift_dtype = shift.dtype


def _differentiate_adaln(ctx: Any, dh: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, stats = ctx.saved_tensors
    return *_adaln_backward(x, scale, dh, stats, ctx.shift_dtype), None


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, _ = inputs
    ctx.save_for_backward(output[0], branch, gate, scale, output[2])
    ctx.shift_dtype = shift.dtype
    ctx.set_materialize_grads(False)


def _differentiate_gated(
    ctx: Any, dtotal: Tensor | None, dh: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    total, branch, gate, scale, stats = ctx.saved_tensors
    dh = torch.zeros_like(total) if dh is None else dh
    return *_gated_backward(total, branch, gate, scale, dtotal, dh, stats, ctx.shift_dtype), None


_adaln.register_autograd(_differentiate_adaln, setup_context=_save_adaln)
_gated.register_autograd(_differentiate_gated, setup_context=_save_gated)
counts_no_flops(_adaln, _adaln_backward, _gated, _gated_backward)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift.

    Args:
        x: (B, N, D) tokens.
        shift, scale: (B, D), one row a sample.
        eps: added to the variance.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend asked for cannot be had;
            the message names the argument, what was expected and what was got.
    """
    _check_modulation("adaln", x, shift=shift, scale=scale)
    if backend.chosen("adaln", x, norm_launch.unsupported(x)) == "triton":
        return _adaln(x, shift, scale, eps)[0]
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
        ValueError: a shape, dtype or device does not fit, or the backend asked for cannot be had;
            the message names the argument, what was expected and what was got.
    """
    _check_modulation("gated_residual_adaln", x, gate=gate, shift=shift, scale=scale)
    check_shape("gated_residual_adaln", "branch", branch, tuple(x.shape), "(B, N, D)")
    check_floats("gated_residual_adaln", x=x, branch=branch)
    if backend.chosen("gated_residual_adaln", x, norm_launch.unsupported(x)) == "triton":
        return _gated(x, branch, gate, shift, scale, eps)[:2]
    return gated_residual_adaln_reference(x, branch, gate, shift, scale, eps)


def _check_modulation(op: str, x: Tensor, **modulation: Tensor) -> None:
    check_rank(op, "x", x, "B N D")
    for name, tensor in modulation.items():
        check_shape(op, name, tensor, (x.shape[0], x.shape[2]), "(B, D)")
    check_floats(op, x=x, **modulation)
