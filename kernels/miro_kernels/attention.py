"""Attention of image tokens over themselves and over their sample's text, which is ragged.

    o[b, i] = Σ_j softmax_j(q[b, i] · K[b, j] / sqrt(head size)) V[b, j]

K[b] are the image keys of sample b followed by its own text keys, text_k[offsets[b]:offsets[b+1]].
Texts lie end to end without padding; a sample without text attends to its image alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miro_kernels._shapes import check_rank, check_shape, widen


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    text_offsets: Tensor,
    longest_text: int,
) -> Tensor:
    if longest_text == 0 or len(text_k) == 0:
        mask = None
    else:
        lengths = text_offsets.diff()
        owner = torch.repeat_interleave(lengths, output_size=len(text_k))
        place = torch.arange(len(text_k), device=q.device) - text_offsets[:-1][owner]
        rows = owner.long() * longest_text + place

        def padded(text: Tensor) -> Tensor:
            # Zeros, and not another sample's tokens: a NaN among them would outlive the mask.
            empty = text.new_zeros(len(q) * longest_text, *text.shape[1:])
            return empty.index_copy(0, rows, text).unflatten(0, (len(q), longest_text))

        k, v = torch.cat((k, padded(text_k)), 1), torch.cat((v, padded(text_v)), 1)
        present = torch.arange(longest_text, device=q.device) < lengths[:, None]
        image = present.new_ones(len(q), q.shape[1])
        mask = torch.cat((image, present), 1)[:, None, None]
    dtype = q.dtype
    if q.device.type == "cpu":
        # Torch's bf16 backward is much slower than its fp32 one on a CPU (2.15, AVX-512).
        q, k, v = widen(q), widen(k), widen(v)
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    return out.transpose(1, 2).to(dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    text_offsets: Tensor,
    longest_text: int | None = None,
) -> Tensor:
    """Attention of q over [k, this sample's text_k].

    Args:
        q, k, v: (B, N, heads, head size).
        text_k, text_v: (T, heads, head size), the texts of the batch end to end.
        text_offsets: (B + 1,) int32; sample b's text is rows offsets[b] to offsets[b + 1].
        longest_text: a bound on every text's length. Read from the offsets, which waits for the
            device, where it is not given.

    Returns:
        (B, N, heads, head size) in q's dtype.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    op = "attention"
    check_rank(op, "q", q, "B N heads head_size")
    batch, _, heads, size = q.shape
    for name, tensor in (("k", k), ("v", v)):
        check_shape(op, name, tensor, tuple(q.shape), "(B, N, heads, head size)")
    for name, tensor in (("text_k", text_k), ("text_v", text_v)):
        check_shape(op, name, tensor, (len(text_k), heads, size), "(T, heads, head size)")
    check_shape(op, "text_offsets", text_offsets, (batch + 1,), "(B + 1,)")
    if text_offsets.dtype != torch.int32:
        raise ValueError(f"{op}: text_offsets must be int32, got {text_offsets.dtype}")
    if longest_text is None:
        longest_text = int(text_offsets.diff().max()) if batch else 0
    return attention_reference(q, k, v, text_k, text_v, text_offsets, longest_text)
