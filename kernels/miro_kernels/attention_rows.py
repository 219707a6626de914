"""Rows of one attention head inside a kernel: how they are read, multiplied and written.

A tile of rows is a tuple of tensors whose widths are powers of two, as Triton asks: head size 96 is
64 and 32 channels side by side, every other size is one tensor. Padding 96 to 128 would cost a
third more of every product and of every accumulator's registers.

Rows are read through plain pointers on every target. Tensor descriptors (TMA) for q, k, v and o
were compiled for sm_90 beside them, in tiles of 128 queries and 64 keys, and won nothing: 311
instructions in the loop over image keys for 294 at head size 64, and 344 for 350 at 128, with as
many programs resident; a text could not use them, since its end is none of its tensor's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from miro_kernels import tiles
from miro_kernels._triton import jit, tl
from miro_kernels.tiles import Tile


@jit
def program(tiles, HEADS):
    """(tile, head, sample) of this program; the tiles of one head, which share its keys, are
    neighbours. One grid axis, because the other two end at 65,535."""
    pid = tl.program_id(0)
    return pid % tiles, (pid // tiles % HEADS).to(tl.int64), (pid // tiles // HEADS).to(tl.int64)


@jit
def _load_part(ptr, row_stride, rows, present, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    at = ptr + rows[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]
    if MASKED:
        return tl.load(at, mask=present[:, None], other=0.0)
    else:
        return tl.load(at)


@jit
def load_rows(ptr, row_stride, rows, present, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """The head's rows at `rows` below ptr; zeros where MASKED and not `present`."""
    if SIZE == 96:
        return (
            _load_part(ptr, row_stride, rows, present, 64, MASKED),
            _load_part(ptr + 64, row_stride, rows, present, 32, MASKED),
        )
    else:
        return (_load_part(ptr, row_stride, rows, present, SIZE, MASKED),)


@jit
def _store_part(ptr, row_stride, rows, present, part, MASKED: tl.constexpr):
    at = ptr + rows[:, None] * row_stride + tl.arange(0, part.shape[1])[None, :]
    if MASKED:
        tl.store(at, part.to(ptr.dtype.element_ty), mask=present[:, None])
    else:
        tl.store(at, part.to(ptr.dtype.element_ty))


@jit
def store_rows(ptr, row_stride, rows, present, tile, MASKED: tl.constexpr):
    _store_part(ptr, row_stride, rows, present, tile[0], MASKED)
    if len(tile) == 2:
        _store_part(ptr + tile[0].shape[1], row_stride, rows, present, tile[1], MASKED)


@jit
def load_values(ptr, rows, present, other, MASKED: tl.constexpr):
    """One number a row, such as its log-sum-exp."""
    if MASKED:
        return tl.load(ptr + rows, mask=present, other=other)
    else:
        return tl.load(ptr + rows)


@jit
def store_values(ptr, rows, present, values, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + rows, values, mask=present)
    else:
        tl.store(ptr + rows, values)


@jit
def zero_rows(ROWS: tl.constexpr, SIZE: tl.constexpr):
    if SIZE == 96:
        return (tl.zeros((ROWS, 64), tl.float32), tl.zeros((ROWS, 32), tl.float32))
    else:
        return (tl.zeros((ROWS, SIZE), tl.float32),)


@jit
def scale_rows(tile, factor):
    """Each row times its factor: a column (ROWS, 1), or one number for all."""
    if len(tile) == 2:
        return (tile[0] * factor, tile[1] * factor)
    else:
        return (tile[0] * factor,)


@jit
def products(left, right):
    """(ROWS, COLUMNS) in fp32: each row of left times each row of right.

    Tensor cores would round fp32 operands to the ten bits of tf32; `ieee` keeps them whole.
    """
    out = tl.dot(left[0], tl.trans(right[0]), input_precision="ieee")
    if len(left) == 2:
        out = tl.dot(left[1], tl.trans(right[1]), out, input_precision="ieee")
    return out


@jit
def row_products(left, right):
    """(ROWS,) in fp32: each row of left times the same row of right."""
    out = tl.sum(left[0].to(tl.float32) * right[0].to(tl.float32), 1)
    if len(left) == 2:
        out += tl.sum(left[1].to(tl.float32) * right[1].to(tl.float32), 1)
    return out


@jit
def weights_of(logits, scale_log2, lse):
    """The softmax's weights from its log-sum-exp, base 2.

    No weight is above 1, but a fused multiply-add leaves the rounding of a large log-sum-exp, which
    may be larger than any exponent: the gradients of large logits would be infinite.
    """
    exponents = logits * scale_log2 - lse
    return tl.exp2(tl.minimum(exponents, 0.0, propagate_nan=tl.PropagateNan.ALL))


@jit
def add_weighted(total, weights, tile):
    """total + weights · tile, the weights rounded to the tile's dtype for the matrix unit."""
    rounded = weights.to(tile[0].dtype)
    first = tl.dot(rounded, tile[0], total[0], input_precision="ieee")
    if len(tile) == 2:
        return (first, tl.dot(rounded, tile[1], total[1], input_precision="ieee"))
    else:
        return (first,)


SIZES = (32, 64, 96, 128)
"""Head sizes the kernels are written for."""


def shared_arguments(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, offsets: Tensor, tile: Tile
) -> dict[str, Any]:
    """What every attention kernel takes, by name: tensors, strides, sizes and tile."""
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
        "RAGGED_Q": tokens % tile["queries"] != 0, "RAGGED_K": tokens % tile["keys"] != 0,
        "num_warps": tile["warps"], "num_stages": tile["stages"],
    }  # fmt: skip


def batch_strides(name: str, tensor: Tensor) -> dict[str, int]:
    batch, row, head, channel = tensor.stride()
    assert channel == 1, f"the channels of {name} must lie side by side"
    return {f"{name}_batch": batch, f"{name}_row": row, f"{name}_head": head}


def attention_tile(kernel: str, q: Tensor) -> Tile:
    """The tile of `kernel` (forward, queries or keys) for q's head size, dtype and tokens."""
    _, tokens, _, size = q.shape
    wide = "_fp32" if q.dtype == torch.float32 else ""
    tile = tiles.tile(f"attention_{kernel}_{size}{wide}")
    # An image of fewer tokens than half a tile of queries takes a smaller one: the same rows of
    # each warp, down to the 64 rows and four warps of a matrix unit.
    while kernel != "keys" and tile["queries"] >= max(128, 2 * tokens):
        warps = max(4, tile["warps"] // 2)
        tile = {**tile, "queries": tile["queries"] // 2, "warps": warps}
    return tile
