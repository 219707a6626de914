"""Attention in plain torch: SDPA over image keys and padded text keys, with a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miro_kernels._checks import widen

CPU_FLASH_MIN_TOKENS = 256
"""Image tokens from which a CPU uses `attention.cpu`; below, the compiler fuses the reference."""


def padded_rows(lengths: Tensor, text_offsets: Tensor, text_tokens: int, width: int) -> Tensor:
    """The row of each packed text token in (B * width) padded rows, (T,) int64."""
    sample = torch.repeat_interleave(lengths, output_size=text_tokens)
    position = torch.arange(text_tokens, device=lengths.device) - text_offsets[:-1][sample]
    return sample.long() * width + position


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    text_offsets: Tensor,
    longest_text: int,
) -> Tensor:
    """The specification of `attention`, which documents the arguments.

    Texts are padded to `longest_text`, which is required here.
    """
    if longest_text == 0 or len(text_k) == 0:
        # Add an empty sum so that the text has a zero gradient, as in the kernels: a None gradient
        # on one rank alone would break the all-reduce of gradients.
        k, v = k + text_k[:0].sum(), v + text_v[:0].sum()
        mask = None
    else:
        lengths = text_offsets.diff()
        rows = padded_rows(lengths, text_offsets, len(text_k), longest_text)

        def padded(text: Tensor) -> Tensor:
            # Pad with zeros: NaN times a masked weight of 0 is NaN.
            empty = text.new_zeros(len(q) * longest_text, *text.shape[1:])
            return empty.index_copy(0, rows, text).unflatten(0, (len(q), longest_text))

        k, v = torch.cat((k, padded(text_k)), 1), torch.cat((v, padded(text_v)), 1)
        is_text = torch.arange(longest_text, device=q.device) < lengths[:, None]
        is_image = is_text.new_ones(len(q), q.shape[1])
        mask = torch.cat((is_image, is_text), 1)[:, None, None]
    dtype = q.dtype
    if q.device.type == "cpu" and q.shape[1] < CPU_FLASH_MIN_TOKENS:
        # With few tokens, SDPA's bf16 backward on a CPU is slower than its fp32 one.
        q, k, v = widen(q), widen(k), widen(v)
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    return out.transpose(1, 2).to(dtype)
