"""Launches of the kernels in norm_kernels.py: what adaln and reward_adaln have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miro_kernels._triton import ceil_div, power_of_2
from miro_kernels.norm_kernels import backward_kernel, fold_kernel, forward_kernel, table_kernel
from miro_kernels.tiles import Tile, tile

MAX_CHANNELS = 8192


def unsupported(x: Tensor) -> str | None:
    """Why the kernels cannot norm `x`, or None where they can."""
    if 1 <= x.shape[-1] <= MAX_CHANNELS:
        return None
    # A row lives in the registers of one program.
    return f"the kernels norm rows of 1 to {MAX_CHANNELS} channels, not {x.shape[-1]}"


class Rewards(NamedTuple):
    """What reward_adaln adds to base: see its arguments."""

    block: Tensor
    table: Tensor
    bins: Tensor
    keep: Tensor


def _rows_last(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension dense, which is all the kernels ask of a modulation."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def results(x: Tensor) -> tuple[Tensor, Tensor]:
    """h and the (2, B, N) mean and rstd of a forward pass, not yet filled."""
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


class _Walk(NamedTuple):
    """How programs walk over a (B, N, D) tensor."""

    chunks: int
    """Programs a sample."""
    settings: dict[str, int]
    """What every kernel over tokens takes."""


def _walk(x: Tensor, settings: Tile) -> _Walk:
    batch, tokens, channels = x.shape
    block = power_of_2(channels)
    fair = max(1, batch * tokens // settings["programs"])
    chunk = min(settings["tokens"], 1 << fair.bit_length() - 1, power_of_2(tokens))
    warps = max(1, min(settings["warps"], block // 256))
    rows = max(1, min(settings["rows"] * 256 * warps // block, power_of_2(tokens)))
    chunk = max(chunk, rows)
    return _Walk(
        ceil_div(tokens, chunk),
        {
            "D": channels,
            "BLOCK": block,
            "ROWS": rows,
            "CHUNK": chunk,
            "STAGES": settings["stages"],
            "num_warps": warps,
        },
    )


def _reward_arguments(rewards: Rewards | None) -> dict[str, Any]:
    """The reward arguments of both token kernels; without rewards, what compiles them away."""
    if rewards is None:
        absent = ("block_ptr", "table_ptr", "bins_ptr", "keep_ptr")
        zero = ("table_reward", "levels", "REWARDS", "BLOCK_STRIDE", "LEVEL_STRIDE", "PART_STRIDE")
        return {**dict.fromkeys(absent), **dict.fromkeys(zero, 0)}
    block, table = _rows_last(rewards.block), _rows_last(rewards.table)
    keep = rewards.keep if rewards.keep.dtype == torch.bool else rewards.keep != 0
    return {
        "block_ptr": block,
        "table_ptr": table,
        "table_reward": table.stride(0),
        "levels": table.shape[1],
        "bins_ptr": rewards.bins.contiguous(),
        "keep_ptr": keep.contiguous().view(torch.uint8),
        "BLOCK_STRIDE": block.stride(0),
        "LEVEL_STRIDE": table.stride(1),
        "PART_STRIDE": table.stride(2),
        "REWARDS": table.shape[0],
    }


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rewards: Rewards | None,
    eps: float,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """x′ (None without a branch), h, and (2, B, N) mean and rstd; gate, shift, scale are (B, D)."""
    x = x.contiguous()
    batch, tokens, _ = x.shape
    h, stats = results(x)
    total = None if branch is None else torch.empty_like(h)
    walk = _walk(x, tile("norm_forward"))
    shift, scale = _rows_last(shift), _rows_last(scale)
    gate = None if gate is None else _rows_last(gate)
    forward_kernel[(batch * walk.chunks,)](
        x_ptr=x,
        branch_ptr=None if branch is None else branch.contiguous(),
        gate_ptr=gate,
        shift_ptr=shift,
        scale_ptr=scale,
        GATE_STRIDE=0 if gate is None else gate.stride(0),
        SHIFT_STRIDE=shift.stride(0),
        SCALE_STRIDE=scale.stride(0),
        **_reward_arguments(rewards),
        sum_ptr=total,
        h_ptr=h,
        stats_ptr=stats,
        n_rows=batch * tokens,
        n_tokens=tokens,
        n_chunks=walk.chunks,
        eps=eps,
        PARTS=2 if branch is None else 3,
        **walk.settings,
    )
    return total, h, stats


class Gradients(NamedTuple):
    """What one pass over the tokens gives; the sums over a sample's tokens are still partial."""

    x: Tensor
    branch: Tensor | None
    partials: Tensor  # (B, chunks, K, D) fp32


def backward(
    x: Tensor,
    branch: Tensor | None,
    dh: Tensor,
    dsum: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    rewards: Rewards | None,
    stats: Tensor,
) -> Gradients:
    """Gradients from dh and, where x′ was used beside the norm, dsum; x is x′ with a branch."""
    x, dh = x.contiguous(), dh.contiguous()
    batch, tokens, channels = x.shape
    walk = _walk(x, tile("norm_backward"))
    parts = 2 if branch is None else 3
    dx = x.new_empty(x.shape)
    dbranch = None if branch is None else branch.new_empty(branch.shape)
    partials = x.new_empty((batch, walk.chunks, parts, channels), dtype=torch.float32)
    scale = _rows_last(scale)
    gate = None if gate is None else _rows_last(gate)
    backward_kernel[(batch * walk.chunks,)](
        x_ptr=x,
        branch_ptr=None if branch is None else branch.contiguous(),
        dh_ptr=dh,
        dsum_ptr=None if dsum is None else dsum.contiguous(),
        gate_ptr=gate,
        scale_ptr=scale,
        GATE_STRIDE=0 if gate is None else gate.stride(0),
        SCALE_STRIDE=scale.stride(0),
        **_reward_arguments(rewards),
        stats_ptr=stats,
        dx_ptr=dx,
        dbranch_ptr=dbranch,
        partials_ptr=partials,
        n_rows=batch * tokens,
        n_tokens=tokens,
        n_chunks=walk.chunks,
        PARTS=2 if branch is None else 3,
        **walk.settings,
    )
    return Gradients(dx, dbranch, partials)


def fold(
    partials: Tensor, dgate: Tensor | None, dshift: Tensor, dscale: Tensor, **rewards: Any
) -> None:
    """Sum partials over chunks into dgate, dshift, dscale (B, D), all of one row stride.

    `rewards` are the kernel's reward arguments, for fold_rewards alone.
    """
    batch, chunks, parts, channels = partials.shape
    columns = min(256, power_of_2(channels))
    absent = dict.fromkeys(("sums_ptr", "bins_ptr", "keep_ptr", "held_ptr"))
    fold_kernel[(batch, ceil_div(channels, columns))](
        partials_ptr=partials,
        dgate_ptr=dgate,
        dshift_ptr=dshift,
        dscale_ptr=dscale,
        n_chunks=chunks,
        **(rewards or {**absent, "REWARDS": 0}),
        STRIDE=dshift.stride(0),
        PARTS=parts,
        D=channels,
        COLUMNS=columns,
        ROWS=min(8, power_of_2(chunks)),
        num_warps=2,
    )


def fold_rewards(partials: Tensor, base: Tensor, rewards: Rewards) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of base (B, K, D), block (K, D) and table (R, L, K, D) from the partials."""
    given = _reward_arguments(rewards)
    dbase = base.new_empty(base.shape)
    dblock = rewards.block.new_empty(rewards.block.shape)
    dtable = rewards.table.new_empty(rewards.table.shape)
    count, levels = rewards.table.shape[:2]
    # The sums over samples start from fp32, and not from dbase, which is rounded.
    sums = base.new_empty(base.shape, dtype=torch.float32)
    held = base.new_empty((count, len(base)), dtype=torch.int32)
    *dgate, dshift, dscale = dbase.unbind(1)
    fold(
        partials,
        dgate[0] if dgate else None,
        dshift,
        dscale,
        sums_ptr=sums,
        bins_ptr=given["bins_ptr"],
        keep_ptr=given["keep_ptr"],
        held_ptr=held,
        REWARDS=count,
    )
    width = dblock.numel()
    columns = min(512, power_of_2(width))
    table_kernel[(count * levels + 1, ceil_div(width, columns))](
        sums_ptr=sums,
        held_ptr=held,
        dblock_ptr=dblock,
        dtable_ptr=dtable,
        n_samples=len(sums),
        levels=max(1, levels),
        REWARDS=count,
        WIDTH=width,
        SAMPLES=16,
        COLUMNS=columns,
        num_warps=4,
    )
    return dbase, dblock, dtable
