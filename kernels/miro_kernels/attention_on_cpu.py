"""Attention of many tokens on a CPU: torch's own, keeping for backward what the kernels keep.

Autograd would keep the keys and values as torch's attention takes them, joined with the texts,
which are padded. Here the arguments are kept as they came, with o and the log-sum-exp of each row
of logits, and backward joins them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from miro_kernels._checks import widen

# Fewer tokens cost less in the reference, which the compiler fuses with what is around it.
LEAST_TOKENS = 256

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Keys:
    """Where a batch's keys lie: a sample's image, then its text, padded to the longest."""

    def __init__(self, k: Tensor, text_k: Tensor, offsets: Tensor, longest: int) -> None:
        batch, self.tokens, heads, size = k.shape
        width = self.tokens + (longest if len(text_k) else 0)
        self.shape = batch, width, heads, size
        lengths = offsets.diff()
        owner = torch.repeat_interleave(lengths, output_size=len(text_k))
        place = torch.arange(len(text_k)) - offsets[owner]
        self.rows = owner.long() * width + self.tokens + place
        self.mask = None
        if len(text_k):
            absent = torch.arange(width) >= self.tokens + lengths[:, None]
            mask = k.new_zeros(batch, width).masked_fill_(absent, -torch.inf)
            self.mask = mask[:, None, None].expand(-1, -1, self.tokens, -1)

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, heads, keys, head size) of both."""
        joined = image.new_empty(self.shape)
        joined[:, : self.tokens] = image
        # Zeros, and not what lay there: a NaN would outlive the mask.
        joined[:, self.tokens :] = 0
        joined.flatten(0, 1).index_copy_(0, self.rows, text)
        return joined.transpose(1, 2)

    def part(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """The image's and the text's of what has the keys' shape."""
        joined = joined.transpose(1, 2).contiguous()
        text = joined.flatten(0, 1).index_select(0, self.rows)
        return joined[:, : self.tokens].contiguous(), text


@torch.library.custom_op("miro::attention_on_cpu", mutates_args=())
def attention_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_offsets: Tensor,
    longest_text: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attention`, and the log-sum-exp of each row of logits, (B, heads, N)."""
    if not q.numel():
        return q.new_empty(q.shape), _empty_lse(q)
    keys = _Keys(k, text_k, text_offsets, longest_text)
    k, v = keys.join(k, text_k), keys.join(v, text_v)
    out, lse = _forward(q.transpose(1, 2), k, v, attn_mask=keys.mask)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


@torch.library.custom_op("miro::attention_on_cpu_backward", mutates_args=())
def attention_on_cpu_backward(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_offsets: Tensor,
    longest_text: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, text_k and text_v."""
    if not q.numel():
        zeros = (tensor.new_zeros(tensor.shape) for tensor in (q, k, v, text_k, text_v))
        return tuple(zeros)  # pyright: ignore[reportReturnType]
    keys = _Keys(k, text_k, text_offsets, longest_text)
    k, v = keys.join(k, text_k), keys.join(v, text_v)
    dout, q, out = (tensor.transpose(1, 2) for tensor in (dout, q, out))
    dq, dk, dv = _backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=keys.mask)
    (dk, dtext_k), (dv, dtext_v) = keys.part(dk), keys.part(dv)
    return dq.transpose(1, 2).contiguous(), dk, dv, dtext_k, dtext_v


def _empty_lse(q: Tensor) -> Tensor:
    batch, tokens, heads, _ = q.shape
    return widen(q[:0]).new_empty(batch, heads, tokens)


@attention_on_cpu.register_fake
def _(q, k, v, text_k, text_v, text_offsets, longest_text):
    return q.new_empty(q.shape), _empty_lse(q)


@attention_on_cpu_backward.register_fake
def _(dout, out, lse, q, k, v, text_k, text_v, text_offsets, longest_text):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v, text_k, text_v))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest_text = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple:
    if dout is None:
        return (None,) * 7
    return *attention_on_cpu_backward(dout, *ctx.saved_tensors, ctx.longest_text), None, None


attention_on_cpu.register_autograd(_differentiate, setup_context=_save)


# Padding is computed too. As torch counts its own, forward 2 products and backward 5.
@register_flop_formula(torch.ops.miro.attention_on_cpu)
def _forward_flops(q, k, v, text_k, text_v, text_offsets, longest_text, **others) -> int:
    batch, tokens, heads, size = q
    width = tokens + (longest_text if text_k[0] else 0)
    return 4 * batch * heads * tokens * width * size


@register_flop_formula(torch.ops.miro.attention_on_cpu_backward)
def _backward_flops(dout, out, lse, *inputs, **others) -> int:
    return _forward_flops(*inputs) * 5 // 2
