"""Registration of an attention op with torch.library: fake tensors, autograd and FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

from miro_kernels._checks import widen


def empty_lse(q: Tensor) -> Tensor:
    """An uninitialized log-sum-exp for q (B, N, heads, head size): (B, heads, N), fp32 or fp64."""
    batch, tokens, heads, _ = q.shape
    return widen(q[:0]).new_empty(batch, heads, tokens)


def register_attention(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]],
    query_key_pairs: Callable[..., int],
) -> CustomOpDef:
    """Register miro::`name` and miro::`name`_backward.

    Args:
        name: of the forward op.
        forward: (q, k, v, text_k, text_v, text_offsets, longest_text) to (o, log-sum-exp).
        backward: (do, o, log-sum-exp, *arguments of forward) to the gradients of q, k, v, text_k
            and text_v. These inputs are what autograd saves.
        query_key_pairs: (shapes of q and of text_k, longest_text) to the pairs of a query and a key
            of one head for which `forward` computes products, for torch's FLOP counter.

    Returns:
        The differentiable op.
    """
    forward_op = torch.library.custom_op(f"miro::{name}", forward, mutates_args=())
    backward_op = torch.library.custom_op(f"miro::{name}_backward", backward, mutates_args=())

    @forward_op.register_fake
    def _(q, k, v, text_k, text_v, text_offsets, longest_text):
        return q.new_empty(q.shape), empty_lse(q)

    @backward_op.register_fake
    def _(dout, out, lse, q, k, v, text_k, text_v, text_offsets, longest_text):
        return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v, text_k, text_v))

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.longest_text = inputs
        ctx.save_for_backward(*output, *tensors)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple:
        if dout is None:
            return (None,) * 7
        return *backward_op(dout, *ctx.saved_tensors, ctx.longest_text), None, None

    forward_op.register_autograd(differentiate, setup_context=setup_context)

    # Forward is 2 matrix products; backward counts as 5, like torch's own SDPA backward.
    @register_flop_formula(getattr(torch.ops.miro, name))
    def forward_flops(q, k, v, text_k, text_v, text_offsets, longest_text, **out) -> int:
        _, _, heads, size = q
        return 4 * query_key_pairs(q, text_k, longest_text) * heads * size

    @register_flop_formula(getattr(torch.ops.miro, f"{name}_backward"))
    def backward_flops(dout, out, lse, *inputs, **others) -> int:
        return forward_flops(*inputs) * 5 // 2

    return forward_op
