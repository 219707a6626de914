"""Forward pass of attention over image keys and ragged text keys: kernel and launcher.

One program makes one tile of queries of one head: it walks over the sample's image keys, then over
its text keys, with the running maximum and sum of FlashAttention (arXiv 2205.14135), so that no
logit reaches memory. Weights are powers of 2, which is what the device computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miro_kernels._triton import ceil_div, jit, tl
from miro_kernels.attention_rows import (
    add_weighted,
    attention_tile,
    load_rows,
    products,
    program,
    scale_rows,
    shared_arguments,
    store_rows,
    store_values,
    zero_rows,
)


@jit
def _attend(
    q, k_ptr, v_ptr, k_row, v_row, first, count, highest, total, out, scale_log2,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take keys first … first + BLOCK, of `count` in all, into the running softmax."""
    rows = tl.arange(0, BLOCK)
    present = rows < count - first
    k = load_rows(k_ptr + tl.cast(first, tl.int64) * k_row, k_row, rows, present, SIZE, MASKED)
    logits = products(q, k)
    if MASKED:
        logits = tl.where(present[None, :], logits, float("-inf"))
    raised = tl.maximum(highest, tl.max(logits, 1))
    # Subtracted before scaled: fused into one multiply-add, large logits would leave the rounding
    # of their maximum, which may be larger than any exponent.
    weights = tl.exp2((logits - raised[:, None]) * scale_log2)
    shrink = tl.exp2((highest - raised) * scale_log2)
    v = load_rows(v_ptr + tl.cast(first, tl.int64) * v_row, v_row, rows, present, SIZE, MASKED)
    out = add_weighted(scale_rows(out, shrink[:, None]), weights, v)
    return raised, total * shrink + tl.sum(weights, 1), out


@jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, text_k_ptr, text_v_ptr, offsets_ptr, out_ptr, lse_ptr,
    N, HEADS, scale_log2,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    text_k_row, text_k_head, text_v_row, text_v_head,
    SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr,
):  # fmt: skip
    tile, head, sample = program(tl.cdiv(N, BLOCK_Q), HEADS)
    first = (tile * BLOCK_Q).to(tl.int64)
    rows = tl.arange(0, BLOCK_Q)
    present = rows < N - first
    q_ptr += sample * q_batch + first * q_row + head * q_head
    q = load_rows(q_ptr, q_row, rows, present, SIZE, RAGGED_Q)
    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out = zero_rows(BLOCK_Q, SIZE)

    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    for at in range(0, N, BLOCK_K):
        highest, total, out = _attend(
            q, k_ptr, v_ptr, k_row, v_row, at, N, highest, total, out, scale_log2,
            SIZE, BLOCK_K, RAGGED_K,
        )  # fmt: skip

    start = tl.load(offsets_ptr + sample)
    length = tl.load(offsets_ptr + sample + 1) - start
    text_k_ptr += start.to(tl.int64) * text_k_row + head * text_k_head
    text_v_ptr += start.to(tl.int64) * text_v_row + head * text_v_head
    for at in range(0, length, BLOCK_T):
        highest, total, out = _attend(
            q, text_k_ptr, text_v_ptr, text_k_row, text_v_row, at, length,
            highest, total, out, scale_log2, SIZE, BLOCK_T, True,
        )  # fmt: skip

    out = scale_rows(out, (1.0 / total)[:, None])
    out_ptr += ((sample * N + first) * HEADS + head) * SIZE
    store_rows(out_ptr, HEADS * SIZE, rows, present, out, RAGGED_Q)
    lse_ptr += (sample * HEADS + head) * N + first
    store_values(lse_ptr, rows, present, highest * scale_log2 + tl.log2(total), RAGGED_Q)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, N, heads, head size) output, and the (B, heads, N) log-sum-exp of its logits, base 2."""
    batch, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if out.numel():
        tile = attention_tile("forward", q)
        _attention_forward_kernel[(ceil_div(tokens, tile["queries"]) * heads * batch,)](
            **shared_arguments(q, k, v, text_k, text_v, offsets, tile), out_ptr=out, lse_ptr=lse
        )
    return out, lse
