"""Compiling what a run needs before its first step.

A kernel is compiled where it is first launched, which takes seconds; on many ranks that is a first
step in which some wait long for others, or for a collective that times out.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from miro_kernels._triton import INTERPRETING
from miro_kernels.adaln import reward_adaln
from miro_kernels.adamw_ema import AdamWEMA
from miro_kernels.attention import attention
from miro_kernels.backend import select_backend
from miro_kernels.qk_norm_rope import qk_norm_rope
from miro_kernels.swiglu import swiglu


class Shape(Protocol):
    """The part of a model's configuration that decides the shapes of its kernels."""

    @property
    def channels(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def hidden(self) -> int: ...


def prewarm(
    model: Shape,
    *,
    batch: int,
    tokens: int,
    rewards: int,
    levels: int,
    dtype: torch.dtype,
    device: str | torch.device,
    text: int = 16,
    optimized: tuple[torch.dtype, torch.dtype] | None = None,
) -> None:
    """Launch every kernel of a block and of the optimizer once, forward and backward.

    Does nothing where the backend is not Triton, or Triton only interprets.

    Args:
        model: channels, heads and hidden (the SwiGLU's width) of the transformer.
        batch: samples of a step on this device.
        tokens: of an image.
        rewards, levels: of the table of modulation.
        dtype: of parameters and activations.
        device: where the run computes.
        text: tokens of each sample's text; their number compiles nothing anew.
        optimized: dtypes of the parameters and of the gradients that the optimizer sees; None where
            both are `dtype`, as they are where nothing is sharded or accumulated.
    """
    some = torch.empty(0, dtype=dtype, device=device)
    if INTERPRETING or select_backend("prewarm", some) != "triton":
        return
    channels, heads = model.channels, model.heads
    size = channels // heads

    def zeros(*shape: int) -> Tensor:
        return some.new_zeros(shape).requires_grad_()

    # Strides are those of the transformer: slices of one base, one table and one list of offsets,
    # and q, k and v of one projection. They are part of what a kernel is compiled for.
    x, base = zeros(batch, tokens, channels), zeros(batch, 2, 3, channels)[:, 1]
    block, table = zeros(3, 3, channels)[1], zeros(rewards, levels, 2, 3, channels)[:, :, 1]
    bins = torch.zeros(batch, rewards, dtype=torch.int64, device=device)
    known = (bins, bins.bool())
    h = reward_adaln(x, base[:, 1:], block[1:], table[:, :, 1:], *known)
    assert isinstance(h, Tensor)
    q, k, v = zeros(batch, tokens, 3, heads, size).unbind(2)
    weight = zeros(size)
    angles = torch.zeros(tokens, size // 2, device=device)
    q, k = qk_norm_rope(q, k, weight, weight, angles, angles)
    text_k, text_v = zeros(batch * text, 2, heads, size).unbind(1)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * text
    # Keys have been normed, which leaves them dense.
    branch = attention(q, k, v, text_k.contiguous(), text_v, offsets, text).flatten(2)
    both = reward_adaln(x, base, block, table, *known, branch=branch)
    hidden = swiglu(zeros(batch, tokens, 2 * model.hidden))
    # Twice, since in the last norm of a network x′ has no other use.
    for outputs in ((h, *both, hidden), both[1:]):
        torch.autograd.backward(outputs, [torch.zeros_like(z) for z in outputs], retain_graph=True)
    # The optimizer's kernel has a form for sizes that are no multiple of 16.
    held, gradients = optimized or (dtype, dtype)
    params = [nn.Parameter(some.new_zeros(size, dtype=held)) for size in (16, 1)]
    for param in params:
        param.grad_dtype = gradients
        param.grad = torch.zeros_like(param, dtype=gradients)
    optimizer = AdamWEMA(params)
    optimizer.grad_scale = torch.ones((), device=device)
    optimizer.step()
