"""Attention of many tokens on a CPU: torch's flash attention over padded text.

Autograd of `attention_reference` would save the concatenated, padded keys and values. This op saves
its own arguments, o and the log-sum-exp, as the Triton kernels do, and pads again in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miro_kernels.attention.library import empty_lse, register_attention
from miro_kernels.attention.reference import padded_rows

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _PaddedKeys:
    """Layout of a batch's keys: the image keys of a sample, then its text keys, padded."""

    def __init__(self, k: Tensor, text_k: Tensor, offsets: Tensor, longest_text: int) -> None:
        batch, self.tokens, heads, size = k.shape
        width = self.tokens + (longest_text if len(text_k) else 0)
        self.shape = batch, width, heads, size
        lengths = offsets.diff()
        self.text_rows = padded_rows(lengths, offsets, len(text_k), width) + self.tokens
        self.mask = None
        if len(text_k):
            padding = torch.arange(width) >= self.tokens + lengths[:, None]
            mask = k.new_zeros(batch, width).masked_fill_(padding, -torch.inf)
            self.mask = mask[:, None, None].expand(-1, -1, self.tokens, -1)

    def concat(self, image: Tensor, text: Tensor) -> Tensor:
        """Image (B, N, heads, head size) and packed text to (B, heads, keys, head size)."""
        keys = image.new_empty(self.shape)
        keys[:, : self.tokens] = image
        # Pad with zeros: NaN in uninitialized memory would pass through the mask.
        keys[:, self.tokens :] = 0
        keys.flatten(0, 1).index_copy_(0, self.text_rows, text)
        return keys.transpose(1, 2)

    def split(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `concat`: the image rows and the packed text rows."""
        keys = keys.transpose(1, 2).contiguous()
        text = keys.flatten(0, 1).index_select(0, self.text_rows)
        return keys[:, : self.tokens].contiguous(), text


def _forward(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_offsets: Tensor,
    longest_text: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not q.numel():
        return q.new_empty(q.shape), empty_lse(q)
    keys = _PaddedKeys(k, text_k, text_offsets, longest_text)
    k, v = keys.concat(k, text_k), keys.concat(v, text_v)
    out, lse = _flash(q.transpose(1, 2), k, v, attn_mask=keys.mask)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_offsets: Tensor,
    longest_text: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not q.numel():
        zeros = (tensor.new_zeros(tensor.shape) for tensor in (q, k, v, text_k, text_v))
        return tuple(zeros)  # pyright: ignore[reportReturnType]
    keys = _PaddedKeys(k, text_k, text_offsets, longest_text)
    k, v = keys.concat(k, text_k), keys.concat(v, text_v)
    dout, q, out = (tensor.transpose(1, 2) for tensor in (dout, q, out))
    dq, dk, dv = _flash_backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=keys.mask)
    (dk, dtext_k), (dv, dtext_v) = keys.split(dk), keys.split(dv)
    return dq.transpose(1, 2).contiguous(), dk, dv, dtext_k, dtext_v


def _query_key_pairs(q: tuple, text_k: tuple, longest_text: int) -> int:
    """Padding is computed too."""
    batch, tokens, _, _ = q
    return batch * tokens * (tokens + (longest_text if text_k[0] else 0))


attention_on_cpu = register_attention("attention_on_cpu", _forward, _backward, _query_key_pairs)
"""As `attention`, and returns the log-sum-exp of the logits, (B, heads, N), besides."""
