"""Per-head RMS norm of queries and keys, then rotary position embedding, in one pass.

    x̂ = x / sqrt(mean(x²) + eps)        n = x̂ · weight          over the channels of each head
    y = (a·cos − b·sin, a·sin + b·cos)                          a, b: first and second half of n

Backward, dy = (c, d): the rotation turns back, then the norm's gradient with g = dn · weight.

    dn = (c·cos + d·sin, d·cos − c·sin)        dweight = Σ dn · x̂        over samples, tokens, heads
    dx = (g − x̂ · mean(g · x̂)) / sqrt(mean(x²) + eps)

Saved for backward: q and k as they were given. Bytes an element in bf16, the least possible:
forward 4 (read, written), backward 6; the angles are read once for `samples` samples, and weight
gradients are fp32 partials of each program, folded in a fixed order. Accesses are 16 bytes wide
where half a head is a multiple of that.

The norm keeps attention logits bounded (arXiv 2302.05442), the rotation encodes the place of an
image token (RoFormer, arXiv 2104.09864; the angles of a 2-D grid are the caller's).
"""

# pyright: reportGeneralTypeIssues=false
# (tl.range is a loop to the compiler and not to Python.)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miro_kernels._checks import check_floats, check_rank, check_shape, widen
from miro_kernels._triton import ceil_div, counts_no_flops, jit, power_of_2, reduce_rows, tl
from miro_kernels.backend import select_backend
from miro_kernels.tiles import Tile, tile

EPS = 1e-6


def rms_norm_reference(x: Tensor, weight: Tensor) -> Tensor:
    wide = widen(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * widen(weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = widen(cos)[:, None], widen(sin)[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    rotated_q = _rotate(rms_norm_reference(q, q_weight), cos, sin)
    rotated_k = _rotate(rms_norm_reference(k, k_weight), cos, sin)
    return rotated_q.to(q.dtype), rotated_k.to(k.dtype)


@jit
def _normed(x_ptr, place, mask, eps, HALF: tl.constexpr):
    """Both halves of x̂, in fp32, and 1 / sqrt(mean(x²) + eps) of each row."""
    a = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + place + HALF, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    return a * rstd, b * rstd, rstd


@jit
def _weight(weight_ptr, columns, HALF: tl.constexpr):
    """Both halves of a norm's weight, as a row."""
    inside = columns < HALF
    first = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(weight_ptr + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@jit
def _angles(cos_ptr, sin_ptr, token, columns, mask, HALF: tl.constexpr):
    place = token[:, None] * HALF + columns[None, :]
    cos = tl.load(cos_ptr + place, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + place, mask=mask, other=0.0).to(tl.float32)


@jit
def _rotated(x_ptr, out_ptr, place, out_place, mask, weight, angles, eps, HALF: tl.constexpr):
    """Norm and rotate one tile of heads."""
    first_weight, second_weight = weight
    cos, sin = angles
    a, b, _ = _normed(x_ptr, place, mask, eps, HALF)
    a, b = a * first_weight, b * second_weight
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + out_place, (a * cos - b * sin).to(dtype), mask=mask)
    tl.store(out_ptr + out_place + HALF, (a * sin + b * cos).to(dtype), mask=mask)


@jit
def _rope_norm_backward(x_ptr, dy_ptr, dx_ptr, place, out_place, mask, weight, angles, eps,
                 HALF: tl.constexpr):  # fmt: skip
    """dx of one tile of heads; returns what its rows add to both halves of dweight."""
    first_weight, second_weight = weight
    cos, sin = angles
    a, b, rstd = _normed(x_ptr, place, mask, eps, HALF)
    c = tl.load(dy_ptr + out_place, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy_ptr + out_place + HALF, mask=mask, other=0.0).to(tl.float32)
    da, db = c * cos + d * sin, d * cos - c * sin
    first, second = da * a, db * b
    da, db = da * first_weight, db * second_weight
    along = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / (2 * HALF))[:, None]
    dtype = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + out_place, (rstd * (da - a * along)).to(dtype), mask=mask)
    tl.store(dx_ptr + out_place + HALF, (rstd * (db - b * along)).to(dtype), mask=mask)
    return first, second


@jit
def _forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    n_samples, n_tokens, eps, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr,
    K_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS (token, head) pairs of SAMPLES samples, which share their angles."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    columns = tl.arange(0, BLOCK)
    mask = (token < n_tokens)[:, None] & (columns < HALF)[None, :]
    angles = _angles(cos_ptr, sin_ptr, token, columns, mask, HALF)
    q_weight = _weight(q_weight_ptr, columns, HALF)
    k_weight = _weight(k_weight_ptr, columns, HALF)
    first = tl.program_id(1) * SAMPLES
    for sample in tl.range(first, tl.minimum(first + SAMPLES, n_samples), num_stages=STAGES):
        at = (tl.cast(sample, tl.int64) * n_tokens + token)[:, None]
        out_place = (at * HEADS + head[:, None]) * 2 * HALF + columns[None, :]
        q_place = at * Q_TOKEN + head[:, None] * Q_HEAD + columns[None, :]
        _rotated(q_ptr, q_out_ptr, q_place, out_place, mask, q_weight, angles, eps, HALF)
        k_place = at * K_TOKEN + head[:, None] * K_HEAD + columns[None, :]
        _rotated(k_ptr, k_out_ptr, k_place, out_place, mask, k_weight, angles, eps, HALF)


@jit
def _backward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_out_ptr, dk_out_ptr,
    dq_ptr, dk_ptr, partials_ptr,
    n_samples, n_tokens, eps, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr,
    K_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq and dk of the same walk, and its sums of the weights' gradients: partials (P, 4, HALF)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    columns = tl.arange(0, BLOCK)
    mask = (token < n_tokens)[:, None] & (columns < HALF)[None, :]
    angles = _angles(cos_ptr, sin_ptr, token, columns, mask, HALF)
    q_weight = _weight(q_weight_ptr, columns, HALF)
    k_weight = _weight(k_weight_ptr, columns, HALF)
    # Kept apart by rows until the end: a sum over rows crosses warps.
    dq_first = tl.zeros((ROWS, BLOCK), tl.float32)
    dq_second = tl.zeros((ROWS, BLOCK), tl.float32)
    dk_first = tl.zeros((ROWS, BLOCK), tl.float32)
    dk_second = tl.zeros((ROWS, BLOCK), tl.float32)
    start = tl.program_id(1) * SAMPLES
    for sample in tl.range(start, tl.minimum(start + SAMPLES, n_samples), num_stages=STAGES):
        at = (tl.cast(sample, tl.int64) * n_tokens + token)[:, None]
        out_place = (at * HEADS + head[:, None]) * 2 * HALF + columns[None, :]
        place = at * Q_TOKEN + head[:, None] * Q_HEAD + columns[None, :]
        first, second = _rope_norm_backward(
            q_ptr, dq_out_ptr, dq_ptr, place, out_place, mask, q_weight, angles, eps, HALF
        )
        dq_first += first
        dq_second += second
        place = at * K_TOKEN + head[:, None] * K_HEAD + columns[None, :]
        first, second = _rope_norm_backward(
            k_ptr, dk_out_ptr, dk_ptr, place, out_place, mask, k_weight, angles, eps, HALF
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
    """Partials (P, 2, SIZE) to the gradients of both weights."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1)
    reduce_rows(partials_ptr, dq_weight_ptr, group, 0, n_partials, columns, 2, SIZE, ROWS)
    reduce_rows(partials_ptr, dk_weight_ptr, group, 1, n_partials, columns, 2, SIZE, ROWS)


def _strided(x: Tensor) -> tuple[Tensor, int, int]:
    """x (B, N, heads, size), and the strides of its tokens, through all samples, and heads.

    A slice of a packed projection is taken as it is; what no such strides describe is copied.
    """
    batch, tokens = x.shape[:2]
    evenly = batch == 1 or tokens == 1 or x.stride(0) == tokens * x.stride(1)
    if x.stride(3) != 1 or not evenly:
        x = x.contiguous()
    return x, x.stride(0) if tokens == 1 else x.stride(1), x.stride(2)


class _Walk(NamedTuple):
    """The programs over a (B, N, heads, size) tensor, and what both kernels take of it."""

    grid: tuple[int, int]
    arguments: dict[str, Any]


def _walk(q: Tensor, k: Tensor, settings: Tile) -> _Walk:
    batch, tokens, heads, size = q.shape
    q, q_token, q_head = _strided(q)
    k, k_token, k_head = _strided(k)
    block = power_of_2(size // 2)
    rows = min(max(1, settings["elements"] // block), power_of_2(tokens * heads))
    across = ceil_div(tokens * heads, rows)
    samples = max(1, min(settings["samples"], batch * across // settings["programs"]))
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
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
    return _Walk((across, ceil_div(batch, samples)), arguments)


@torch.library.custom_op("miro::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    walk = _walk(q, k, tile("qk_forward"))
    _forward_kernel[walk.grid](
        **walk.arguments,
        q_weight_ptr=q_weight.contiguous(),
        k_weight_ptr=k_weight.contiguous(),
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
        q_out_ptr=q_out,
        k_out_ptr=k_out,
    )
    return q_out, k_out


@torch.library.custom_op("miro::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    dq_out: Tensor,
    dk_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and both weights."""
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dq_weight, dk_weight = (w.new_empty(w.shape) for w in (q_weight, k_weight))
    size = q.shape[-1]
    walk = _walk(q, k, tile("qk_backward"))
    programs = walk.grid[0] * walk.grid[1]
    partials = q.new_empty((programs, 2, size), dtype=torch.float32)
    _backward_kernel[walk.grid](
        **walk.arguments,
        q_weight_ptr=q_weight.contiguous(),
        k_weight_ptr=k_weight.contiguous(),
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
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


@_qk_norm_rope.register_fake
def _(q: Tensor, k: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_qk_norm_rope_backward.register_fake
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *others: Tensor) -> Any:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, q_weight, k_weight))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_qk_norm_rope_backward(*ctx.saved_tensors, dq_out, dk_out), None, None


_qk_norm_rope.register_autograd(_differentiate, setup_context=_save)
counts_no_flops("qk_norm_rope", "qk_norm_rope_backward")


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMS-normalise q and k over each head and rotate them.

    Args:
        q, k: (B, N, heads, head size), of any strides; slices of one packed projection are read
            where they are.
        q_weight, k_weight: (head size,).
        cos, sin: (N, head size / 2), the rotation of each token; constants, without a gradient.

    Returns:
        q and k, same shapes and dtypes.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend asked for cannot be had;
            the message names the argument, what was expected and what was got.
    """
    op = "qk_norm_rope"
    check_rank(op, "q", q, "B N heads head_size")
    _, tokens, _, size = q.shape
    if size % 2:
        raise ValueError(f"{op}: the head size must be even to be rotated, got {size}")
    check_shape(op, "k", k, tuple(q.shape), "(B, N, heads, head size)")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_shape(op, name, weight, (size,), "(head size,)")
    for name, angle in (("cos", cos), ("sin", sin)):
        check_shape(op, name, angle, (tokens, size // 2), "(N, head size / 2)")
    check_floats(op, q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    if select_backend(op, q, _unsupported(q, cos, sin)) == "triton":
        return _qk_norm_rope(q, k, q_weight, k_weight, cos, sin)
    return qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin)


def _unsupported(q: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernels cannot take these arguments, or None where they can."""
    if not 2 <= q.shape[3] <= 1024:
        return f"the kernels rotate heads of 2 to 1024 channels, not {q.shape[3]}"
    if cos.requires_grad or sin.requires_grad:
        return "the kernels have no gradient of cos and sin"
    return None
