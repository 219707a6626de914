"""Per-head RMS norm of queries and keys, then rotary position embedding (RoPE), in one pass.

    x̂ = x / sqrt(mean(x²) + eps)        n = x̂ · weight          over the channels of each head
    y = (a·cos − b·sin, a·sin + b·cos)                          a, b: first and second half of n

Backward, with dy = (c, d) and g = dn · weight:

    dn = (c·cos + d·sin, d·cos − c·sin)        dweight = Σ dn · x̂        over samples, tokens, heads
    dx = (g − x̂ · mean(g · x̂)) / sqrt(mean(x²) + eps)

Saved for backward: the arguments. Least bytes per element in bf16: forward 4 (load, store) and
backward 6; a program loads the angles once for `samples` samples. Weight gradients are fp32
partials of each program, reduced in a fixed order. Accesses are 16 bytes wide if half a head is a
multiple of that.

Sources: QK norm, which bounds attention logits, arXiv 2302.05442; RoPE, arXiv 2104.09864.
"""

# pyright: reportGeneralTypeIssues=false
# (Triton's tl.range is not iterable in Python.)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miro_kernels._checks import check_floats, check_rank, check_shape, widen
from miro_kernels._triton import ceil_div, counts_no_flops, jit, power_of_2, reduce_rows, tl
from miro_kernels.backend import select_backend
from miro_kernels.tiles import Tile, tile

EPS = 1e-6


def rms_norm_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the RMS norm over the last dimension, in fp32 or fp64."""
    wide = widen(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * widen(weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = widen(cos)[:, None], widen(sin)[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `qk_norm_rope` in plain torch."""
    rotated_q = _rotate(rms_norm_reference(q, q_weight), cos, sin)
    rotated_k = _rotate(rms_norm_reference(k, k_weight), cos, sin)
    return rotated_q.to(q.dtype), rotated_k.to(k.dtype)


@jit
def _rms_norm(x_ptr, offsets, mask, eps, HALF: tl.constexpr):
    """Both halves of x̂ in fp32, and 1 / sqrt(mean(x²) + eps) of each row."""
    a = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    return a * rstd, b * rstd, rstd


@jit
def _load_weight(weight_ptr, columns, HALF: tl.constexpr):
    """Both halves of a norm's weight, each (1, BLOCK)."""
    mask = columns < HALF
    first = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(weight_ptr + HALF + columns, mask=mask, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@jit
def _tile(
    cos_ptr, sin_ptr, n_tokens,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Token, head, columns, mask and angles of this program's (token, head) rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    columns = tl.arange(0, BLOCK)
    mask = (token < n_tokens)[:, None] & (columns < HALF)[None, :]
    offsets = token[:, None] * HALF + columns[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return token, head, columns, mask, (cos, sin)


@jit
def _norm_rope(x_ptr, out_ptr, offsets, out_offsets, mask, weight, angles, eps, HALF: tl.constexpr):
    """Normalise and rotate one tile of heads."""
    first_weight, second_weight = weight
    cos, sin = angles
    a, b, _ = _rms_norm(x_ptr, offsets, mask, eps, HALF)
    a, b = a * first_weight, b * second_weight
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + out_offsets, (a * cos - b * sin).to(dtype), mask=mask)
    tl.store(out_ptr + out_offsets + HALF, (a * sin + b * cos).to(dtype), mask=mask)


@jit
def _rope_norm_backward(x_ptr, dy_ptr, dx_ptr, offsets, out_offsets, mask, weight, angles, eps,
                        HALF: tl.constexpr):  # fmt: skip
    """Store dx of one tile of heads; return each row's term of both halves of dweight."""
    first_weight, second_weight = weight
    cos, sin = angles
    a, b, rstd = _rms_norm(x_ptr, offsets, mask, eps, HALF)
    c = tl.load(dy_ptr + out_offsets, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy_ptr + out_offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    da, db = c * cos + d * sin, d * cos - c * sin
    first, second = da * a, db * b
    da, db = da * first_weight, db * second_weight
    mean_dnorm_xhat = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / (2 * HALF))[:, None]
    dtype = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + out_offsets, (rstd * (da - a * mean_dnorm_xhat)).to(dtype), mask=mask)
    tl.store(dx_ptr + out_offsets + HALF, (rstd * (db - b * mean_dnorm_xhat)).to(dtype), mask=mask)
    return first, second


@jit
def _forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    n_samples, n_tokens, eps, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr,
    K_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Process ROWS (token, head) pairs of SAMPLES samples, which share their angles."""
    token, head, columns, mask, angles = _tile(cos_ptr, sin_ptr, n_tokens, HEADS, HALF, BLOCK, ROWS)
    q_weight = _load_weight(q_weight_ptr, columns, HALF)
    k_weight = _load_weight(k_weight_ptr, columns, HALF)
    start = tl.program_id(1) * SAMPLES
    for sample in tl.range(start, tl.minimum(start + SAMPLES, n_samples), num_stages=STAGES):
        position = (tl.cast(sample, tl.int64) * n_tokens + token)[:, None]
        out_offsets = (position * HEADS + head[:, None]) * 2 * HALF + columns[None, :]
        offsets = position * Q_TOKEN + head[:, None] * Q_HEAD + columns[None, :]
        _norm_rope(q_ptr, q_out_ptr, offsets, out_offsets, mask, q_weight, angles, eps, HALF)
        offsets = position * K_TOKEN + head[:, None] * K_HEAD + columns[None, :]
        _norm_rope(k_ptr, k_out_ptr, offsets, out_offsets, mask, k_weight, angles, eps, HALF)


@jit
def _backward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_out_ptr, dk_out_ptr,
    dq_ptr, dk_ptr, partials_ptr,
    n_samples, n_tokens, eps, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr,
    K_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dq and dk of the same rows, and partials (P, 4, HALF) of the weight gradients."""
    token, head, columns, mask, angles = _tile(cos_ptr, sin_ptr, n_tokens, HEADS, HALF, BLOCK, ROWS)
    q_weight = _load_weight(q_weight_ptr, columns, HALF)
    k_weight = _load_weight(k_weight_ptr, columns, HALF)
    # Accumulate per row and sum the rows once at the end: that sum crosses warps.
    zeros = tl.zeros((ROWS, BLOCK), tl.float32)
    dq_first, dq_second, dk_first, dk_second = zeros, zeros, zeros, zeros
    start = tl.program_id(1) * SAMPLES
    for sample in tl.range(start, tl.minimum(start + SAMPLES, n_samples), num_stages=STAGES):
        position = (tl.cast(sample, tl.int64) * n_tokens + token)[:, None]
        out_offsets = (position * HEADS + head[:, None]) * 2 * HALF + columns[None, :]
        offsets = position * Q_TOKEN + head[:, None] * Q_HEAD + columns[None, :]
        first, second = _rope_norm_backward(
            q_ptr, dq_out_ptr, dq_ptr, offsets, out_offsets, mask, q_weight, angles, eps, HALF
        )
        dq_first += first
        dq_second += second
        offsets = position * K_TOKEN + head[:, None] * K_HEAD + columns[None, :]
        first, second = _rope_norm_backward(
            k_ptr, dk_out_ptr, dk_ptr, offsets, out_offsets, mask, k_weight, angles, eps, HALF
        )
        dk_first += first
        dk_second += second
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    partial = partials_ptr + program.to(tl.int64) * 4 * HALF + columns
    tl.store(partial, tl.sum(dq_first, 0), mask=columns < HALF)
    tl.store(partial + HALF, tl.sum(dq_second, 0), mask=columns < HALF)
    tl.store(partial + 2 * HALF, tl.sum(dk_first, 0), mask=columns < HALF)
    tl.store(partial + 3 * HALF, tl.sum(dk_second, 0), mask=columns < HALF)


@jit
def _reduce_kernel(
    partials_ptr, dq_weight_ptr, dk_weight_ptr, n_partials,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the partials (P, 2, SIZE) into the gradients of both weights."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1)
    reduce_rows(partials_ptr, dq_weight_ptr, group, 0, n_partials, columns, 2, SIZE, ROWS)
    reduce_rows(partials_ptr, dk_weight_ptr, group, 1, n_partials, columns, 2, SIZE, ROWS)


def _token_head_strides(x: Tensor) -> tuple[Tensor, int, int]:
    """Return x (B, N, heads, size) and the strides of its tokens, across samples, and heads.

    A slice of a packed projection needs no copy; tensors without such strides are copied.
    """
    batch, tokens = x.shape[:2]
    regular = batch == 1 or tokens == 1 or x.stride(0) == tokens * x.stride(1)
    if x.stride(3) != 1 or not regular:
        x = x.contiguous()
    return x, x.stride(0) if tokens == 1 else x.stride(1), x.stride(2)


def _launch_config(
    q: Tensor, k: Tensor, weights: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, settings: Tile
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid and the arguments of both kernels."""
    batch, tokens, heads, size = q.shape
    q, q_token, q_head = _token_head_strides(q)
    k, k_token, k_head = _token_head_strides(k)
    block = power_of_2(size // 2)
    rows = min(max(1, settings["elements"] // block), power_of_2(tokens * heads))
    row_programs = ceil_div(tokens * heads, rows)
    samples = max(1, min(settings["samples"], batch * row_programs // settings["programs"]))
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "q_weight_ptr": weights[0].contiguous(),
        "k_weight_ptr": weights[1].contiguous(),
        "cos_ptr": cos.contiguous(),
        "sin_ptr": sin.contiguous(),
        "n_samples": batch,
        "n_tokens": tokens,
        "eps": EPS,
        "Q_TOKEN": q_token,
        "Q_HEAD": q_head,
        "K_TOKEN": k_token,
        "K_HEAD": k_head,
        "HEADS": heads,
        "HALF": size // 2,
        "BLOCK": block,
        "ROWS": rows,
        "SAMPLES": samples,
        "STAGES": settings["stages"],
        "num_warps": max(1, min(settings["warps"], rows * block // 256)),
    }
    return (row_programs, ceil_div(batch, samples)), arguments


@torch.library.custom_op("miro::qk_norm_rope", mutates_args=())
def qk_norm_rope_op(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return q and k, normalised and rotated."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    grid, arguments = _launch_config(q, k, (q_weight, k_weight), cos, sin, tile("qk_forward"))
    _forward_kernel[grid](**arguments, q_out_ptr=q_out, k_out_ptr=k_out)
    return q_out, k_out


@torch.library.custom_op("miro::qk_norm_rope_backward", mutates_args=())
def qk_norm_rope_backward_op(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    dq_out: Tensor, dk_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and both weights."""
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dq_weight, dk_weight = (w.new_empty(w.shape) for w in (q_weight, k_weight))
    size = q.shape[-1]
    grid, arguments = _launch_config(q, k, (q_weight, k_weight), cos, sin, tile("qk_backward"))
    programs = grid[0] * grid[1]
    partials = q.new_empty((programs, 2, size), dtype=torch.float32)
    _backward_kernel[grid](
        **arguments,
        dq_out_ptr=dq_out.contiguous(),
        dk_out_ptr=dk_out.contiguous(),
        dq_ptr=dq,
        dk_ptr=dk,
        partials_ptr=partials,
    )
    columns = min(16, power_of_2(size))
    _reduce_kernel[(ceil_div(size, columns), 1)](
        partials_ptr=partials,
        dq_weight_ptr=dq_weight,
        dk_weight_ptr=dk_weight,
        n_partials=programs,
        SIZE=size,
        COLUMNS=columns,
        ROWS=min(256, power_of_2(programs)),
        num_warps=4,
    )
    return dq, dk, dq_weight, dk_weight


@qk_norm_rope_op.register_fake
def _(q: Tensor, k: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@qk_norm_rope_backward_op.register_fake
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *others: Tensor) -> Any:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, q_weight, k_weight))


def _differentiate(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    return *qk_norm_rope_backward_op(*ctx.saved_tensors, dq_out, dk_out), None, None


qk_norm_rope_op.register_autograd(
    _differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
counts_no_flops("qk_norm_rope", "qk_norm_rope_backward")


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalise q and k over each head by their root mean square, and rotate them.

    Args:
        q: (B, N, heads, head size), of any strides; slices of a packed projection are not copied.
        k: as q.
        q_weight: (head size,) weight of the norm.
        k_weight: as q_weight.
        cos: (N, head size / 2) of each token's angles; constant, without a gradient.
        sin: as cos.

    Returns:
        q and k, same shapes and dtypes.

    Raises:
        ValueError: if an argument's shape, dtype or device does not fit, or if the backend is set
            to one that cannot run; the message names the argument, the expected and actual value.
    """
    op = "qk_norm_rope"
    check_rank(op, "q", q, "B N heads head_size")
    _, tokens, _, size = q.shape
    if size % 2:
        raise ValueError(f"{op}: the head size must be even, got {size}")
    check_shape(op, "k", k, tuple(q.shape), "(B, N, heads, head size)")
    check_shape(op, "q_weight", q_weight, (size,), "(head size,)")
    check_shape(op, "k_weight", k_weight, (size,), "(head size,)")
    check_shape(op, "cos", cos, (tokens, size // 2), "(N, head size / 2)")
    check_shape(op, "sin", sin, (tokens, size // 2), "(N, head size / 2)")
    check_floats(op, q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    if select_backend(op, q, _unsupported(q, cos, sin)) == "triton":
        return qk_norm_rope_op(q, k, q_weight, k_weight, cos, sin)
    return qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin)


def _unsupported(q: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Return why the kernels cannot take these arguments, or None if they can."""
    if not 2 <= q.shape[3] <= 1024:
        return f"the kernels rotate heads of 2 to 1024 channels, not {q.shape[3]}"
    if cos.requires_grad or sin.requires_grad:
        return "the kernels compute no gradient of cos and sin"
    return None
