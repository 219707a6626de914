"""Backward pass of attention over image keys and ragged text keys: kernels and launcher.

Two kernels, and no atomics, since a gradient is summed inside the one program that owns it:

    queries  one program a tile of queries, which walks over all its keys as the forward pass does;
             makes dq, and Δ = Σ_channels o·do, which the second kernel needs, on the way
    keys     one program a tile of image keys, or of one sample's text keys, which walks over that
             sample's queries; makes dk and dv

Both make the weights anew from the logits and their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miro_kernels._triton import ceil_div, jit, tl
from miro_kernels.attention_rows import (
    add_weighted,
    attention_tile,
    batch_strides,
    load_rows,
    load_values,
    products,
    program,
    row_products,
    scale_rows,
    shared_arguments,
    store_rows,
    store_values,
    weights_of,
    zero_rows,
)


@jit
def _add_keys(
    dq, q, do, lse, delta, k_ptr, v_ptr, k_row, v_row, first, count, scale_log2,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq with the share of keys first … first + BLOCK, of `count` in all."""
    rows = tl.arange(0, BLOCK)
    present = rows < count - first
    k = load_rows(k_ptr + tl.cast(first, tl.int64) * k_row, k_row, rows, present, SIZE, MASKED)
    v = load_rows(v_ptr + tl.cast(first, tl.int64) * v_row, v_row, rows, present, SIZE, MASKED)
    logits = products(q, k)
    if MASKED:
        logits = tl.where(present[None, :], logits, float("-inf"))
    weights = weights_of(logits, scale_log2, lse[:, None])
    dlogits = weights * (products(do, v) - delta[:, None])
    return add_weighted(dq, dlogits, k)


@jit
def _attention_backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, text_k_ptr, text_v_ptr, offsets_ptr, out_ptr, dout_ptr, lse_ptr,
    delta_ptr, dq_ptr, N, HEADS, scale, scale_log2,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    text_k_row, text_k_head, text_v_row, text_v_head, dout_batch, dout_row, dout_head,
    SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr,
):  # fmt: skip
    tile, head, sample = program(tl.cdiv(N, BLOCK_Q), HEADS)
    first = (tile * BLOCK_Q).to(tl.int64)
    rows = tl.arange(0, BLOCK_Q)
    present = rows < N - first
    own = ((sample * N + first) * HEADS + head) * SIZE  # in out and dq, which are contiguous
    q_ptr += sample * q_batch + first * q_row + head * q_head
    q = load_rows(q_ptr, q_row, rows, present, SIZE, RAGGED_Q)
    dout_ptr += sample * dout_batch + first * dout_row + head * dout_head
    do = load_rows(dout_ptr, dout_row, rows, present, SIZE, RAGGED_Q)
    out = load_rows(out_ptr + own, HEADS * SIZE, rows, present, SIZE, RAGGED_Q)
    delta = row_products(out, do)
    line = (sample * HEADS + head) * N + first
    store_values(delta_ptr + line, rows, present, delta, RAGGED_Q)
    lse = load_values(lse_ptr + line, rows, present, 0.0, RAGGED_Q)
    dq = zero_rows(BLOCK_Q, SIZE)

    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    for at in range(0, N, BLOCK_K):
        dq = _add_keys(
            dq, q, do, lse, delta, k_ptr, v_ptr, k_row, v_row, at, N, scale_log2,
            SIZE, BLOCK_K, RAGGED_K,
        )  # fmt: skip

    start = tl.load(offsets_ptr + sample)
    length = tl.load(offsets_ptr + sample + 1) - start
    text_k_ptr += start.to(tl.int64) * text_k_row + head * text_k_head
    text_v_ptr += start.to(tl.int64) * text_v_row + head * text_v_head
    for at in range(0, length, BLOCK_T):
        dq = _add_keys(
            dq, q, do, lse, delta, text_k_ptr, text_v_ptr, text_k_row, text_v_row, at, length,
            scale_log2, SIZE, BLOCK_T, True,
        )  # fmt: skip

    store_rows(dq_ptr + own, HEADS * SIZE, rows, present, scale_rows(dq, scale), RAGGED_Q)


@jit
def _key_gradients(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr,
    q_row, dout_row, k_row, v_row, own_row, N, count, scale, scale_log2,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr,
    RAGGED: tl.constexpr, RAGGED_Q: tl.constexpr,
):  # fmt: skip
    """dk and dv of the first BLOCK keys of `count`, below the pointers, from all N queries."""
    rows = tl.arange(0, BLOCK)
    present = rows < count
    k = load_rows(k_ptr, k_row, rows, present, SIZE, RAGGED)
    v = load_rows(v_ptr, v_row, rows, present, SIZE, RAGGED)
    dk = zero_rows(BLOCK, SIZE)
    dv = zero_rows(BLOCK, SIZE)
    queries = tl.arange(0, BLOCK_Q)
    for at in range(0, N, BLOCK_Q):
        here = queries < N - at
        q = load_rows(q_ptr + tl.cast(at, tl.int64) * q_row, q_row, queries, here, SIZE, RAGGED_Q)
        # An infinite log-sum-exp makes the weights of queries that are not there exactly zero.
        # Keys that are not there need no mask: each has its own row of dk and dv, never stored.
        lse = load_values(lse_ptr + at, queries, here, float("inf"), RAGGED_Q)
        weights = weights_of(products(k, q), scale_log2, lse[None, :])
        dout_at = dout_ptr + tl.cast(at, tl.int64) * dout_row
        do = load_rows(dout_at, dout_row, queries, here, SIZE, RAGGED_Q)
        dv = add_weighted(dv, weights, do)
        delta = load_values(delta_ptr + at, queries, here, 0.0, RAGGED_Q)
        dlogits = weights * (products(v, do) - delta[None, :])
        dk = add_weighted(dk, dlogits, q)
    store_rows(dk_ptr, own_row, rows, present, scale_rows(dk, scale), RAGGED)
    store_rows(dv_ptr, own_row, rows, present, dv, RAGGED)


@jit
def _attention_backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, text_k_ptr, text_v_ptr, offsets_ptr, dout_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dtext_k_ptr, dtext_v_ptr, N, HEADS, batch, scale, scale_log2,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    text_k_row, text_k_head, text_v_row, text_v_head, dout_batch, dout_row, dout_head,
    SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr,
):  # fmt: skip
    image_tiles = tl.cdiv(N, BLOCK_K)
    # The tiles of a head follow from the grid: as an argument, a number that differs in every batch
    # would be compiled for anew where it is 1 or a multiple of 16.
    tile, head, sample = program(tl.num_programs(0) // (HEADS * batch), HEADS)
    q_ptr += sample * q_batch + head * q_head
    dout_ptr += sample * dout_batch + head * dout_head
    lse_ptr += (sample * HEADS + head) * N
    delta_ptr += (sample * HEADS + head) * N
    if tile < image_tiles:
        first = (tile * BLOCK_K).to(tl.int64)
        own = ((sample * N + first) * HEADS + head) * SIZE
        _key_gradients(
            q_ptr, dout_ptr, lse_ptr, delta_ptr,
            k_ptr + sample * k_batch + first * k_row + head * k_head,
            v_ptr + sample * v_batch + first * v_row + head * v_head,
            dk_ptr + own, dv_ptr + own, q_row, dout_row, k_row, v_row, HEADS * SIZE,
            N, N - first, scale, scale_log2,
            SIZE, BLOCK_K, BLOCK_Q, RAGGED_K, RAGGED_Q,
        )  # fmt: skip
    else:
        # Tiles are launched for the longest text there may be; those past a sample's end leave.
        first = ((tile - image_tiles) * BLOCK_T).to(tl.int64)
        start = tl.load(offsets_ptr + sample)
        length = tl.load(offsets_ptr + sample + 1) - start
        if first < length:
            row = start + first
            own = (row * HEADS + head) * SIZE
            _key_gradients(
                q_ptr, dout_ptr, lse_ptr, delta_ptr,
                text_k_ptr + row * text_k_row + head * text_k_head,
                text_v_ptr + row * text_v_row + head * text_v_head,
                dtext_k_ptr + own, dtext_v_ptr + own,
                q_row, dout_row, text_k_row, text_v_row, HEADS * SIZE,
                N, length - first, scale, scale_log2,
                SIZE, BLOCK_T, BLOCK_Q, True, RAGGED_Q,
            )  # fmt: skip


def attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, offsets: Tensor,
    longest_text: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, text_k and text_v, all contiguous."""
    batch, tokens, heads, size = q.shape
    dq, dk, dv, dtext_k, dtext_v = (
        torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (q, k, v, text_k, text_v)
    )
    if not q.numel():
        # No query asked anything of a text.
        return dq, dk, dv, dtext_k.zero_(), dtext_v.zero_()
    delta = torch.empty_like(lse)
    given = {
        "dout_ptr": dout, **batch_strides("dout", dout), "lse_ptr": lse, "delta_ptr": delta,
        "scale": size**-0.5,
    }  # fmt: skip
    tile = attention_tile("queries", q)
    _attention_backward_queries_kernel[(ceil_div(tokens, tile["queries"]) * heads * batch,)](
        **shared_arguments(q, k, v, text_k, text_v, offsets, tile),
        **given, out_ptr=out, dq_ptr=dq,
    )  # fmt: skip
    tile = attention_tile("keys", q)
    tiles = ceil_div(tokens, tile["keys"])
    tiles += ceil_div(min(longest_text, len(text_k)), tile["text"])
    _attention_backward_keys_kernel[(tiles * heads * batch,)](
        **shared_arguments(q, k, v, text_k, text_v, offsets, tile),
        **given, batch=batch,
        dk_ptr=dk, dv_ptr=dv, dtext_k_ptr=dtext_k, dtext_v_ptr=dtext_v,
    )  # fmt: skip
    return dq, dk, dv, dtext_k, dtext_v
