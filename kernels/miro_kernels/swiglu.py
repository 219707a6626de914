"""The gated activation of the MLP: silu(a)·b, where a and b are the halves of one projection.

    y  = a · σ(a) · b
    da = dy · b · σ(a) · (1 + a · (1 − σ(a)))        db = dy · a · σ(a)

Saved for backward: the packed projection. Least bytes per element of y in bf16: forward a, b, y
(6); backward a, b, dy, da, db (10), with da and db stored packed, as the projection's backward
takes them. torch.compile moves the same bytes; the gain over it is its compile time.

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miro_kernels._checks import check_floats, widen
from miro_kernels._triton import ceil_div, counts_no_flops, jit, jit_unspecialized, power_of_2, tl
from miro_kernels.backend import select_backend
from miro_kernels.tiles import Tile, tile


def swiglu_reference(packed: Tensor) -> Tensor:
    """Compute `swiglu` in plain torch."""
    gate, value = packed.chunk(2, -1)
    return (F.silu(widen(gate)) * widen(value)).to(packed.dtype)


# In the text MLP, n_rows is the number of text tokens in the batch, which changes every step.
@jit_unspecialized("n_rows")
def _forward_kernel(
    packed_ptr, out_ptr, n_rows, FEATURES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Compute a tile of out (M, F) from packed (M, 2F)."""
    row, column, mask = _tile_indices(n_rows, FEATURES, ROWS, COLUMNS)
    gate_ptr = packed_ptr + row * 2 * FEATURES + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(gate_ptr + FEATURES, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * value
    tl.store(out_ptr + row * FEATURES + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit_unspecialized("n_rows")
def _backward_kernel(
    packed_ptr, dout_ptr, dpacked_ptr, n_rows,
    FEATURES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute both halves of a tile of dpacked (M, 2F) from packed and dout (M, F)."""
    row, column, mask = _tile_indices(n_rows, FEATURES, ROWS, COLUMNS)
    offsets = row * 2 * FEATURES + column
    gate = tl.load(packed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(packed_ptr + offsets + FEATURES, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * FEATURES + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dout * value * sigmoid * (1 + gate * (1 - sigmoid))
    dvalue = dout * gate * sigmoid
    tl.store(dpacked_ptr + offsets, dgate.to(dpacked_ptr.dtype.element_ty), mask=mask)
    tl.store(dpacked_ptr + offsets + FEATURES, dvalue.to(dpacked_ptr.dtype.element_ty), mask=mask)


@jit
def _tile_indices(n_rows, FEATURES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, columns and mask of this program's tile; the grid goes along rows first."""
    ACROSS: tl.constexpr = (FEATURES + COLUMNS - 1) // COLUMNS  # type: ignore[assignment]
    row = (tl.program_id(0) // ACROSS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :], (row < n_rows)[:, None] & (column < FEATURES)[None, :]


def _launch(kernel: Any, settings: Tile, rows: int, features: int, **tensors: Tensor) -> None:
    """Launch `kernel` over tiles of (rows, features)."""
    # With a divisor of the features no lane is masked.
    columns = min(settings["columns"], features & -features)
    if columns < 128:
        columns = min(settings["columns"], power_of_2(features))
    tile_rows = min(settings["elements"] // columns, power_of_2(rows))
    kernel[(ceil_div(rows, tile_rows) * ceil_div(features, columns),)](
        **tensors,
        n_rows=rows,
        FEATURES=features,
        ROWS=tile_rows,
        COLUMNS=columns,
        num_warps=max(1, min(settings["warps"], tile_rows * columns // 256)),
    )


@torch.library.custom_op("miro::swiglu", mutates_args=())
def swiglu_op(packed: Tensor) -> Tensor:
    """Return (..., F)."""
    packed = packed.contiguous()
    features = packed.shape[-1] // 2
    out = packed.new_empty((*packed.shape[:-1], features))
    if out.numel():
        rows = out.numel() // features
        _launch(
            _forward_kernel, tile("swiglu_forward"), rows, features, packed_ptr=packed, out_ptr=out
        )
    return out


@torch.library.custom_op("miro::swiglu_backward", mutates_args=())
def swiglu_backward_op(packed: Tensor, dout: Tensor) -> Tensor:
    """Return the gradient of packed."""
    packed, dout = packed.contiguous(), dout.contiguous()
    dpacked = torch.empty_like(packed)
    if dout.numel():
        _launch(
            _backward_kernel,
            tile("swiglu_backward"),
            dout.numel() // dout.shape[-1],
            dout.shape[-1],
            packed_ptr=packed,
            dout_ptr=dout,
            dpacked_ptr=dpacked,
        )
    return dpacked


@swiglu_op.register_fake
def _(packed: Tensor) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


@swiglu_backward_op.register_fake
def _(packed: Tensor, dout: Tensor) -> Tensor:
    return packed.new_empty(packed.shape)


def _differentiate(ctx: Any, dout: Tensor) -> Tensor:
    return swiglu_backward_op(*ctx.saved_tensors, dout)


swiglu_op.register_autograd(
    _differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
counts_no_flops("swiglu", "swiglu_backward")


def swiglu(packed: Tensor) -> Tensor:
    """Compute silu(a)·b for packed = [a, b].

    Args:
        packed: (..., 2F), both halves from one matrix product.

    Returns:
        (..., F) in packed's dtype.

    Raises:
        ValueError: if packed's last dimension is odd or its dtype is not a float, or if the backend
            is set to one that cannot run.
    """
    if packed.shape[-1] % 2:
        raise ValueError(f"swiglu: packed's last dimension must be even, got {packed.shape[-1]}")
    check_floats("swiglu", packed=packed)
    if select_backend("swiglu", packed) == "triton":
        return swiglu_op(packed)
    return swiglu_reference(packed)
