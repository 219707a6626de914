"""Backward kernels of attention over image keys and ragged text keys, and their launcher.

Two kernels without atomics, since one program owns each gradient:

    queries  one program per tile of queries loops over all its keys, as in forward. It computes dq,
             and Δ = Σ_channels o·do for the second kernel
    keys     one program per tile of image keys, or of one sample's text keys, loops over that
             sample's queries. It computes dk and dv

Both recompute the probabilities p from the logits and their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miro_kernels._triton import ceil_div, jit, tl
from miro_kernels.attention.tile_ops import (
    accumulate_pv,
    attention_tile,
    batch_strides,
    decode_pid,
    kernel_args,
    load_row_stats,
    load_rows,
    qk_dot,
    row_dot,
    scale_rows,
    softmax_probs,
    store_row_stats,
    store_rows,
    zero_rows,
)


@jit
def _accumulate_dq(
    dq, q, do, lse, delta, k_ptr, v_ptr, k_row, v_row, start, count, scale_log2,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add dz · k to dq, for keys start … start + BLOCK of `count`."""
    rows = tl.arange(0, BLOCK)
    mask = rows < count - start
    k = load_rows(k_ptr + tl.cast(start, tl.int64) * k_row, k_row, rows, mask, SIZE, MASKED)
    v = load_rows(v_ptr + tl.cast(start, tl.int64) * v_row, v_row, rows, mask, SIZE, MASKED)
    logits = qk_dot(q, k)
    if MASKED:
        logits = tl.where(mask[None, :], logits, float("-inf"))
    p = softmax_probs(logits, scale_log2, lse[:, None])
    dz = p * (qk_dot(do, v) - delta[:, None])
    return accumulate_pv(dq, dz, k)


@jit
def _attention_backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, text_k_ptr, text_v_ptr, offsets_ptr, out_ptr, dout_ptr, lse_ptr,
    delta_ptr, dq_ptr, N, HEADS, scale, scale_log2,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    text_k_row, text_k_head, text_v_row, text_v_head, dout_batch, dout_row, dout_head,
    SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr,
):  # fmt: skip
    tile, head, sample = decode_pid(tl.cdiv(N, BLOCK_Q), HEADS)
    q_start = (tile * BLOCK_Q).to(tl.int64)
    rows = tl.arange(0, BLOCK_Q)
    mask = rows < N - q_start
    out_offset = ((sample * N + q_start) * HEADS + head) * SIZE  # out and dq are contiguous
    q_ptr += sample * q_batch + q_start * q_row + head * q_head
    q = load_rows(q_ptr, q_row, rows, mask, SIZE, MASK_Q)
    dout_ptr += sample * dout_batch + q_start * dout_row + head * dout_head
    do = load_rows(dout_ptr, dout_row, rows, mask, SIZE, MASK_Q)
    out = load_rows(out_ptr + out_offset, HEADS * SIZE, rows, mask, SIZE, MASK_Q)
    delta = row_dot(out, do)
    stats_offset = (sample * HEADS + head) * N + q_start
    store_row_stats(delta_ptr + stats_offset, rows, mask, delta, MASK_Q)
    lse = load_row_stats(lse_ptr + stats_offset, rows, mask, 0.0, MASK_Q)
    dq = zero_rows(BLOCK_Q, SIZE)

    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    for start in range(0, N, BLOCK_K):
        dq = _accumulate_dq(
            dq, q, do, lse, delta, k_ptr, v_ptr, k_row, v_row, start, N, scale_log2,
            SIZE, BLOCK_K, MASK_K,
        )  # fmt: skip

    text_start = tl.load(offsets_ptr + sample)
    length = tl.load(offsets_ptr + sample + 1) - text_start
    text_k_ptr += text_start.to(tl.int64) * text_k_row + head * text_k_head
    text_v_ptr += text_start.to(tl.int64) * text_v_row + head * text_v_head
    for start in range(0, length, BLOCK_T):
        dq = _accumulate_dq(
            dq, q, do, lse, delta, text_k_ptr, text_v_ptr, text_k_row, text_v_row, start, length,
            scale_log2, SIZE, BLOCK_T, True,
        )  # fmt: skip

    dq = scale_rows(dq, scale)
    store_rows(dq_ptr + out_offset, HEADS * SIZE, rows, mask, dq, MASK_Q)


@jit
def _dk_dv_tile(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr,
    q_row, dout_row, k_row, v_row, out_row, N, count, scale, scale_log2,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr,
    MASKED: tl.constexpr, MASK_Q: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of the first min(BLOCK, count) keys at k_ptr and v_ptr, from N queries."""
    rows = tl.arange(0, BLOCK)
    mask = rows < count
    k = load_rows(k_ptr, k_row, rows, mask, SIZE, MASKED)
    v = load_rows(v_ptr, v_row, rows, mask, SIZE, MASKED)
    dk = zero_rows(BLOCK, SIZE)
    dv = zero_rows(BLOCK, SIZE)
    q_rows = tl.arange(0, BLOCK_Q)
    for start in range(0, N, BLOCK_Q):
        q_mask = q_rows < N - start
        q_at = q_ptr + tl.cast(start, tl.int64) * q_row
        q = load_rows(q_at, q_row, q_rows, q_mask, SIZE, MASK_Q)
        # lse = inf makes p of masked queries exactly zero. Masked keys need no such care: each has
        # its own row of dk and dv, which is not stored.
        lse = load_row_stats(lse_ptr + start, q_rows, q_mask, float("inf"), MASK_Q)
        p = softmax_probs(qk_dot(k, q), scale_log2, lse[None, :])
        dout_at = dout_ptr + tl.cast(start, tl.int64) * dout_row
        do = load_rows(dout_at, dout_row, q_rows, q_mask, SIZE, MASK_Q)
        dv = accumulate_pv(dv, p, do)
        delta = load_row_stats(delta_ptr + start, q_rows, q_mask, 0.0, MASK_Q)
        dz = p * (qk_dot(v, do) - delta[None, :])
        dk = accumulate_pv(dk, dz, q)
    store_rows(dk_ptr, out_row, rows, mask, scale_rows(dk, scale), MASKED)
    store_rows(dv_ptr, out_row, rows, mask, dv, MASKED)


@jit
def _attention_backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, text_k_ptr, text_v_ptr, offsets_ptr, dout_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dtext_k_ptr, dtext_v_ptr, N, HEADS, batch, scale, scale_log2,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    text_k_row, text_k_head, text_v_row, text_v_head, dout_batch, dout_row, dout_head,
    SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr,
):  # fmt: skip
    image_tiles = tl.cdiv(N, BLOCK_K)
    # Derive the tiles per head from the grid. As an argument, this number changes with every batch
    # and Triton would specialize, so recompile, for 1 and for multiples of 16.
    tile, head, sample = decode_pid(tl.num_programs(0) // (HEADS * batch), HEADS)
    q_ptr += sample * q_batch + head * q_head
    dout_ptr += sample * dout_batch + head * dout_head
    lse_ptr += (sample * HEADS + head) * N
    delta_ptr += (sample * HEADS + head) * N
    if tile < image_tiles:
        start = (tile * BLOCK_K).to(tl.int64)
        out_offset = ((sample * N + start) * HEADS + head) * SIZE
        _dk_dv_tile(
            q_ptr, dout_ptr, lse_ptr, delta_ptr,
            k_ptr + sample * k_batch + start * k_row + head * k_head,
            v_ptr + sample * v_batch + start * v_row + head * v_head,
            dk_ptr + out_offset, dv_ptr + out_offset, q_row, dout_row, k_row, v_row, HEADS * SIZE,
            N, N - start, scale, scale_log2,
            SIZE, BLOCK_K, BLOCK_Q, MASK_K, MASK_Q,
        )  # fmt: skip
    else:
        # The grid covers the longest possible text; programs past a sample's text do nothing.
        start = ((tile - image_tiles) * BLOCK_T).to(tl.int64)
        text_start = tl.load(offsets_ptr + sample)
        length = tl.load(offsets_ptr + sample + 1) - text_start
        if start < length:
            row = text_start + start
            out_offset = (row * HEADS + head) * SIZE
            _dk_dv_tile(
                q_ptr, dout_ptr, lse_ptr, delta_ptr,
                text_k_ptr + row * text_k_row + head * text_k_head,
                text_v_ptr + row * text_v_row + head * text_v_head,
                dtext_k_ptr + out_offset, dtext_v_ptr + out_offset,
                q_row, dout_row, text_k_row, text_v_row, HEADS * SIZE,
                N, length - start, scale, scale_log2,
                SIZE, BLOCK_T, BLOCK_Q, True, MASK_Q,
            )  # fmt: skip


def attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, offsets: Tensor,
    longest_text: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch both backward kernels: the contiguous gradients of q, k, v, text_k and text_v.

    Takes the gradient of `out`, then the results and arguments of `attention_forward`.
    """
    batch, tokens, heads, size = q.shape
    dq, dk, dv, dtext_k, dtext_v = (
        torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (q, k, v, text_k, text_v)
    )
    if not q.numel():
        return dq, dk, dv, dtext_k.zero_(), dtext_v.zero_()
    delta = torch.empty_like(lse)
    arguments = {
        "dout_ptr": dout, **batch_strides("dout", dout), "lse_ptr": lse, "delta_ptr": delta,
        "scale": size**-0.5,
    }  # fmt: skip
    tile = attention_tile("queries", q)
    _attention_backward_queries_kernel[(ceil_div(tokens, tile["queries"]) * heads * batch,)](
        **kernel_args(q, k, v, text_k, text_v, offsets, tile),
        **arguments, out_ptr=out, dq_ptr=dq,
    )  # fmt: skip
    tile = attention_tile("keys", q)
    tiles = ceil_div(tokens, tile["keys"])
    tiles += ceil_div(min(longest_text, len(text_k)), tile["text"])
    _attention_backward_keys_kernel[(tiles * heads * batch,)](
        **kernel_args(q, k, v, text_k, text_v, offsets, tile),
        **arguments, batch=batch,
        dk_ptr=dk, dv_ptr=dv, dtext_k_ptr=dtext_k, dtext_v_ptr=dtext_v,
    )  # fmt: skip
    return dq, dk, dv, dtext_k, dtext_v
