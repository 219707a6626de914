"""Forward kernel of attention over image keys and ragged text keys, and its launcher.

One program computes one tile of queries of one head. It loops over the sample's image keys, then
over its text keys, with the online softmax of FlashAttention-2 (arXiv 2307.08691), in its notation:
running maximum m_i, running sum l_i, accumulator acc. Exponentials are exp2, the GPU's instruction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miro_kernels._triton import ceil_div, jit, tl
from miro_kernels.attention.tile_ops import (
    accumulate_pv,
    attention_tile,
    decode_pid,
    kernel_args,
    load_rows,
    qk_dot,
    scale_rows,
    store_row_stats,
    store_rows,
    zero_rows,
)


@jit
def _online_softmax_step(
    q, k_ptr, v_ptr, k_row, v_row, start, count, m_i, l_i, acc, scale_log2,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update (m_i, l_i, acc) with keys start … start + BLOCK of `count`."""
    rows = tl.arange(0, BLOCK)
    mask = rows < count - start
    k = load_rows(k_ptr + tl.cast(start, tl.int64) * k_row, k_row, rows, mask, SIZE, MASKED)
    logits = qk_dot(q, k)
    if MASKED:
        logits = tl.where(mask[None, :], logits, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    # Subtract before scaling. One fused multiply-add would leave the rounding error of the scaled
    # maximum in the exponent, which for large logits exceeds any exponent.
    p = tl.exp2((logits - m_new[:, None]) * scale_log2)
    alpha = tl.exp2((m_i - m_new) * scale_log2)
    v = load_rows(v_ptr + tl.cast(start, tl.int64) * v_row, v_row, rows, mask, SIZE, MASKED)
    acc = accumulate_pv(scale_rows(acc, alpha[:, None]), p, v)
    return m_new, l_i * alpha + tl.sum(p, 1), acc


@jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, text_k_ptr, text_v_ptr, offsets_ptr, out_ptr, lse_ptr,
    N, HEADS, scale_log2,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    text_k_row, text_k_head, text_v_row, text_v_head,
    SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr,
):  # fmt: skip
    tile, head, sample = decode_pid(tl.cdiv(N, BLOCK_Q), HEADS)
    q_start = (tile * BLOCK_Q).to(tl.int64)
    rows = tl.arange(0, BLOCK_Q)
    mask = rows < N - q_start
    q_ptr += sample * q_batch + q_start * q_row + head * q_head
    q = load_rows(q_ptr, q_row, rows, mask, SIZE, MASK_Q)
    m_i = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_Q,), tl.float32)
    acc = zero_rows(BLOCK_Q, SIZE)

    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    for start in range(0, N, BLOCK_K):
        m_i, l_i, acc = _online_softmax_step(
            q, k_ptr, v_ptr, k_row, v_row, start, N, m_i, l_i, acc, scale_log2,
            SIZE, BLOCK_K, MASK_K,
        )  # fmt: skip

    text_start = tl.load(offsets_ptr + sample)
    length = tl.load(offsets_ptr + sample + 1) - text_start
    text_k_ptr += text_start.to(tl.int64) * text_k_row + head * text_k_head
    text_v_ptr += text_start.to(tl.int64) * text_v_row + head * text_v_head
    for start in range(0, length, BLOCK_T):
        m_i, l_i, acc = _online_softmax_step(
            q, text_k_ptr, text_v_ptr, text_k_row, text_v_row, start, length,
            m_i, l_i, acc, scale_log2, SIZE, BLOCK_T, True,
        )  # fmt: skip

    out = scale_rows(acc, (1.0 / l_i)[:, None])
    out_ptr += ((sample * N + q_start) * HEADS + head) * SIZE
    store_rows(out_ptr, HEADS * SIZE, rows, mask, out, MASK_Q)
    lse_ptr += (sample * HEADS + head) * N + q_start
    store_row_stats(lse_ptr, rows, mask, m_i * scale_log2 + tl.log2(l_i), MASK_Q)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Returns:
        The (B, N, heads, head size) output, and the base-2 log-sum-exp of the scaled logits,
        (B, heads, N) in fp32.
    """
    batch, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if out.numel():
        tile = attention_tile("forward", q)
        _attention_forward_kernel[(ceil_div(tokens, tile["queries"]) * heads * batch,)](
            **kernel_args(q, k, v, text_k, text_v, offsets, tile), out_ptr=out, lse_ptr=lse
        )
    return out, lse
