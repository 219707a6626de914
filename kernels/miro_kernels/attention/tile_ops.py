"""Load, multiply and store tiles of one attention head inside a kernel, and pick their sizes.

A tile (ROWS, head size) is a tuple of tensors, because Triton needs powers of two: head size 96 is
64 + 32 channels, every other size is one tensor. Padding 96 to 128 would add a third to every
matrix product and to every accumulator's registers.

Rows are loaded through plain pointers on all targets. Tensor descriptors (TMA) for q, k, v and o
gained nothing on sm_90 with tiles of 128 queries and 64 keys: 311 instructions instead of 294 in
the loop over image keys at head size 64, 344 instead of 350 at 128, at equal occupancy. Text keys
could not use them, since a text's end is not a boundary of its tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from miro_kernels import tiles
from miro_kernels._triton import jit, tl
from miro_kernels.tiles import Tile

HEAD_SIZES = (32, 64, 96, 128)
"""Head sizes that the kernels support."""


@jit
def decode_pid(tiles, HEADS):
    """(tile, head, sample) of this program.

    The tiles of one head are neighbours, since they share its keys. The grid has one axis because
    the other two are limited to 65,535.
    """
    pid = tl.program_id(0)
    return pid % tiles, (pid // tiles % HEADS).to(tl.int64), (pid // tiles // HEADS).to(tl.int64)


@jit
def _load_channels(ptr, row_stride, rows, mask, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    ptrs = ptr + rows[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]
    if MASKED:
        return tl.load(ptrs, mask=mask[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@jit
def load_rows(ptr, row_stride, rows, mask, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """The tile of the given rows; zeros for rows outside of `mask` if MASKED."""
    if SIZE == 96:
        return (
            _load_channels(ptr, row_stride, rows, mask, 64, MASKED),
            _load_channels(ptr + 64, row_stride, rows, mask, 32, MASKED),
        )
    else:
        return (_load_channels(ptr, row_stride, rows, mask, SIZE, MASKED),)


@jit
def _store_channels(ptr, row_stride, rows, mask, values, MASKED: tl.constexpr):
    ptrs = ptr + rows[:, None] * row_stride + tl.arange(0, values.shape[1])[None, :]
    if MASKED:
        tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask[:, None])
    else:
        tl.store(ptrs, values.to(ptr.dtype.element_ty))


@jit
def store_rows(ptr, row_stride, rows, mask, tile, MASKED: tl.constexpr):
    """Store a tile in the pointer's dtype."""
    _store_channels(ptr, row_stride, rows, mask, tile[0], MASKED)
    if len(tile) == 2:
        _store_channels(ptr + tile[0].shape[1], row_stride, rows, mask, tile[1], MASKED)


@jit
def load_row_stats(ptr, rows, mask, other, MASKED: tl.constexpr):
    """One number per row (log-sum-exp or Δ)."""
    if MASKED:
        return tl.load(ptr + rows, mask=mask, other=other)
    else:
        return tl.load(ptr + rows)


@jit
def store_row_stats(ptr, rows, mask, values, MASKED: tl.constexpr):
    """Store one number per row."""
    if MASKED:
        tl.store(ptr + rows, values, mask=mask)
    else:
        tl.store(ptr + rows, values)


@jit
def zero_rows(ROWS: tl.constexpr, SIZE: tl.constexpr):
    """An fp32 accumulator tile."""
    if SIZE == 96:
        return (tl.zeros((ROWS, 64), tl.float32), tl.zeros((ROWS, 32), tl.float32))
    else:
        return (tl.zeros((ROWS, SIZE), tl.float32),)


@jit
def scale_rows(tile, factor):
    """The tile times `factor`: (ROWS, 1), or a scalar."""
    if len(tile) == 2:
        return (tile[0] * factor, tile[1] * factor)
    else:
        return (tile[0] * factor,)


@jit
def qk_dot(left, right):
    """Compute left · rightᵀ, (ROWS, COLUMNS) in fp32.

    Tensor cores would round fp32 operands to tf32's 10 mantissa bits, hence `ieee`.
    """
    out = tl.dot(left[0], tl.trans(right[0]), input_precision="ieee")
    if len(left) == 2:
        out = tl.dot(left[1], tl.trans(right[1]), out, input_precision="ieee")
    return out


@jit
def row_dot(left, right):
    """Σ_channels left · right, (ROWS,) in fp32."""
    out = tl.sum(left[0].to(tl.float32) * right[0].to(tl.float32), 1)
    if len(left) == 2:
        out += tl.sum(left[1].to(tl.float32) * right[1].to(tl.float32), 1)
    return out


@jit
def softmax_probs(logits, scale_log2, lse):
    """exp2(logits · scale_log2 − lse), the softmax from its base-2 log-sum-exp.

    The fused multiply-add leaves the rounding error of lse in the exponent. For large logits that
    error exceeds any exponent and gradients would be inf, so clamp probabilities at 1.
    """
    exponents = logits * scale_log2 - lse
    return tl.exp2(tl.minimum(exponents, 0.0, propagate_nan=tl.PropagateNan.ALL))


@jit
def accumulate_pv(acc, p, tile):
    """Compute acc + p · tile, with p cast to the tile's dtype for the tensor cores."""
    p = p.to(tile[0].dtype)
    first = tl.dot(p, tile[0], acc[0], input_precision="ieee")
    if len(tile) == 2:
        return (first, tl.dot(p, tile[1], acc[1], input_precision="ieee"))
    else:
        return (first,)


def kernel_args(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, offsets: Tensor, tile: Tile
) -> dict[str, Any]:
    """Arguments common to all attention kernels: pointers, strides, sizes and launch options."""
    _, tokens, heads, size = q.shape
    pointers = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v,
        "text_k_ptr": text_k, "text_v_ptr": text_v, "offsets_ptr": offsets,
    }  # fmt: skip
    strides: dict[str, int] = {}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        strides |= batch_strides(name, tensor)
    for name, tensor in (("text_k", text_k), ("text_v", text_v)):
        strides |= {f"{name}_row": tensor.stride(0), f"{name}_head": tensor.stride(1)}
    return {
        **pointers, **strides, "N": tokens, "HEADS": heads,
        "scale_log2": size**-0.5 * math.log2(math.e), "SIZE": size,
        "BLOCK_Q": tile["queries"], "BLOCK_K": tile["keys"], "BLOCK_T": tile["text"],
        "MASK_Q": tokens % tile["queries"] != 0, "MASK_K": tokens % tile["keys"] != 0,
        "num_warps": tile["warps"], "num_stages": tile["stages"],
    }  # fmt: skip


def batch_strides(name: str, tensor: Tensor) -> dict[str, int]:
    """Stride arguments of a (B, N, heads, head size) tensor, whose channel stride must be 1."""
    batch, row, head, channel = tensor.stride()
    assert channel == 1, f"{name} must have a channel stride of 1, got {channel}"
    return {f"{name}_batch": batch, f"{name}_row": row, f"{name}_head": head}


def attention_tile(kernel: str, q: Tensor) -> Tile:
    """The tile of `kernel` (forward, queries or keys) for q's head size, dtype and tokens."""
    _, tokens, _, size = q.shape
    suffix = "_fp32" if q.dtype == torch.float32 else ""
    tile = tiles.tile(f"attention_{kernel}_{size}{suffix}")
    # Halve the query tile while it is at least twice the image's tokens, with the same rows per
    # warp, down to the 64 rows and four warps of one wgmma.
    while kernel != "keys" and tile["queries"] >= max(128, 2 * tokens):
        warps = max(4, tile["warps"] // 2)
        tile = {**tile, "queries": tile["queries"] // 2, "warps": warps}
    return tile
