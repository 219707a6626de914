"""Compile the kernels of a run before its first step.

Triton compiles a kernel at its first launch, which takes seconds. With many ranks the first step
would then leave some ranks waiting for others in a collective, until it times out.
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


class ModelShape(Protocol):
    """The fields of a model's configuration that decide the shapes of its kernels."""

    @property
    def channels(self) -> int:
        """Channels of a token."""
        ...

    @property
    def heads(self) -> int:
        """Attention heads."""
        ...

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU."""
        ...


def prewarm(
    model: ModelShape,
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

    Does nothing if the backend is not Triton, or under the interpreter.

    Args:
        model: configuration of the transformer.
        batch: samples per step on this device.
        tokens: tokens per image.
        rewards: rewards in the modulation table.
        levels: bins per reward in that table.
        dtype: dtype of parameters and activations.
        device: device of the run.
        text: text tokens per sample; another number compiles no other kernel.
        optimized: dtypes of the optimizer's parameters and gradients; None if both are `dtype`, as
            without sharding and gradient accumulation.
    """
    like = torch.empty(0, dtype=dtype, device=device)
    if INTERPRETING or select_backend("prewarm", like) != "triton":
        return
    channels, heads = model.channels, model.heads
    size = channels // heads

    def zeros(*shape: int) -> Tensor:
        return like.new_zeros(shape).requires_grad_()

    # Use the transformer's strides, which kernels are specialized for: slices of one base, one
    # table and one tensor of block offsets, and q, k and v of one projection.
    x, base = zeros(batch, tokens, channels), zeros(batch, 2, 3, channels)[:, 1]
    block, table = zeros(3, 3, channels)[1], zeros(rewards, levels, 2, 3, channels)[:, :, 1]
    bins = torch.zeros(batch, rewards, dtype=torch.int64, device=device)
    conditions = (bins, bins.bool())
    h = reward_adaln(x, base[:, 1:], block[1:], table[:, :, 1:], *conditions)
    assert isinstance(h, Tensor)
    q, k, v = zeros(batch, tokens, 3, heads, size).unbind(2)
    weight = zeros(size)
    angles = torch.zeros(tokens, size // 2, device=device)
    q, k = qk_norm_rope(q, k, weight, weight, angles, angles)
    text_k, text_v = zeros(batch * text, 2, heads, size).unbind(1)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * text
    # Text keys are contiguous in the transformer, because they are normalised.
    branch = attention(q, k, v, text_k.contiguous(), text_v, offsets, text).flatten(2)
    gated = reward_adaln(x, base, block, table, *conditions, branch=branch)
    hidden = swiglu(zeros(batch, tokens, 2 * model.hidden))
    # Twice: x′ of the network's last norm is unused, so that its backward has no dresidual.
    for outputs in ((h, *gated, hidden), gated[1:]):
        torch.autograd.backward(outputs, [torch.zeros_like(z) for z in outputs], retain_graph=True)
    # The optimizer's kernel is compiled once more for sizes that are not multiples of 16.
    param_dtype, grad_dtype = optimized or (dtype, dtype)
    params = [nn.Parameter(like.new_zeros(size, dtype=param_dtype)) for size in (16, 1)]
    for param in params:
        param.grad_dtype = grad_dtype
        param.grad = torch.zeros_like(param, dtype=grad_dtype)
    optimizer = AdamWEMA(params)
    optimizer.grad_scale = torch.ones((), device=device)
    optimizer.step()
