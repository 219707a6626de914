"""Launches of the adaptive layer norm's kernels: grids, arguments and outputs.

Two arguments are those of the torch ops. `modulation` is one (B, K, D) tensor or K tensors (B, D):
the gate (with a branch only), shift and scale. `rewards` is [block, table, bins, keep] of
`reward_adaln`, or empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miro_kernels._triton import ceil_div, power_of_2
from miro_kernels.adaln.kernels import backward_kernel, forward_kernel, reduce_kernel, table_kernel
from miro_kernels.tiles import Tile, tile

MAX_CHANNELS = 8192


def unsupported_channels(x: Tensor) -> str | None:
    """Return why the kernels cannot normalise `x`, or None if they can."""
    if 1 <= x.shape[-1] <= MAX_CHANNELS:
        return None
    # One program holds a whole token in its registers.
    return f"the kernels norm rows of 1 to {MAX_CHANNELS} channels, not {x.shape[-1]}"


def empty_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate h, and the (2, B, N) fp32 mean and rstd of the tokens."""
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


class LaunchGrid(NamedTuple):
    """The programs that process a (B, N, D) tensor."""

    chunks: int
    """Programs per sample."""
    constants: dict[str, int]
    """Compile-time arguments of both token kernels."""


def launch_config(x: Tensor, settings: Tile) -> LaunchGrid:
    """Split each sample of `x` into chunks of tokens, one program each."""
    batch, tokens, channels = x.shape
    block = power_of_2(channels)
    tokens_per_program = max(1, batch * tokens // settings["programs"])
    chunk = min(settings["tokens"], 1 << tokens_per_program.bit_length() - 1, power_of_2(tokens))
    warps = max(1, min(settings["warps"], block // 256))
    rows = max(1, min(settings["rows"] * 256 * warps // block, power_of_2(tokens)))
    chunk = max(chunk, rows)
    constants = {
        "D": channels,
        "BLOCK": block,
        "ROWS": rows,
        "CHUNK": chunk,
        "STAGES": settings["stages"],
        "num_warps": warps,
    }
    return LaunchGrid(ceil_div(tokens, chunk), constants)


def forward(
    x: Tensor, branch: Tensor | None, modulation: list[Tensor], rewards: list[Tensor], eps: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return x′ (None without a branch), h, and the (2, B, N) mean and rstd."""
    x = x.contiguous()
    batch, tokens, _ = x.shape
    h, stats = empty_outputs(x)
    residual = None if branch is None else torch.empty_like(h)
    grid = launch_config(x, tile("norm_forward"))
    gate, shift, scale = _rows_of(modulation)
    forward_kernel[(batch * grid.chunks,)](
        x_ptr=x,
        branch_ptr=None if branch is None else branch.contiguous(),
        **_row_arguments(gate=gate, shift=shift, scale=scale),
        **_reward_arguments(rewards),
        residual_ptr=residual,
        h_ptr=h,
        stats_ptr=stats,
        n_rows=batch * tokens,
        n_tokens=tokens,
        n_chunks=grid.chunks,
        eps=eps,
        PARTS=2 if branch is None else 3,
        **grid.constants,
    )
    return residual, h, stats


def backward(
    x: Tensor,
    branch: Tensor | None,
    modulation: list[Tensor],
    rewards: list[Tensor],
    dresidual: Tensor | None,
    dh: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
    """Return the gradients of x, branch, modulation, and of block and table if there are rewards.

    With a branch, `x` is x′, and `dresidual` is its gradient from all uses but the norm, or None.
    """
    x, dh = x.contiguous(), dh.contiguous()
    batch, tokens, channels = x.shape
    grid = launch_config(x, tile("norm_backward"))
    parts = 2 if branch is None else 3
    dx = x.new_empty(x.shape)
    dbranch = None if branch is None else branch.new_empty(branch.shape)
    partials = x.new_empty((batch, grid.chunks, parts, channels), dtype=torch.float32)
    gate, _, scale = _rows_of(modulation)
    reward_arguments = _reward_arguments(rewards)
    backward_kernel[(batch * grid.chunks,)](
        x_ptr=x,
        branch_ptr=None if branch is None else branch.contiguous(),
        dh_ptr=dh,
        dresidual_ptr=None if dresidual is None else dresidual.contiguous(),
        **_row_arguments(gate=gate, scale=scale),
        **reward_arguments,
        stats_ptr=stats,
        dx_ptr=dx,
        dbranch_ptr=dbranch,
        partials_ptr=partials,
        n_rows=batch * tokens,
        n_tokens=tokens,
        n_chunks=grid.chunks,
        PARTS=parts,
        **grid.constants,
    )
    dmodulation = [tensor.new_empty(tensor.shape) for tensor in modulation]
    if not rewards:
        reduce_partials(partials, dmodulation, reward_arguments)
        return dx, dbranch, dmodulation, []
    # Sum over samples from fp32, not from dmodulation, which is rounded to the parameters' dtype.
    sums = x.new_empty((batch, parts, channels), dtype=torch.float32)
    bin_by_sample = x.new_empty((len(rewards[1]), batch), dtype=torch.int32)
    reduce_partials(partials, dmodulation, reward_arguments, sums, bin_by_sample)
    return dx, dbranch, dmodulation, reduce_samples(sums, bin_by_sample, *rewards[:2])


def reduce_partials(
    partials: Tensor,
    dmodulation: list[Tensor],
    reward_arguments: dict[str, Any],
    sums: Tensor | None = None,
    bin_by_sample: Tensor | None = None,
) -> None:
    """Sum the partials (B, chunks, K, D) over chunks into `dmodulation` and, in fp32, `sums`."""
    batch, chunks, parts, channels = partials.shape
    columns = min(256, power_of_2(channels))
    dgate, dshift, dscale = _rows_of(dmodulation)
    reduce_kernel[(batch, ceil_div(channels, columns))](
        partials_ptr=partials,
        dgate_ptr=dgate,
        dshift_ptr=dshift,
        dscale_ptr=dscale,
        sums_ptr=sums,
        bins_ptr=reward_arguments["bins_ptr"],
        keep_ptr=reward_arguments["keep_ptr"],
        bin_by_sample_ptr=bin_by_sample,
        n_chunks=chunks,
        REWARDS=reward_arguments["REWARDS"],
        STRIDE=dshift.stride(0),
        PARTS=parts,
        D=channels,
        COLUMNS=columns,
        ROWS=min(8, power_of_2(chunks)),
        num_warps=2,
    )


def reduce_samples(
    sums: Tensor, bin_by_sample: Tensor, block: Tensor, table: Tensor
) -> list[Tensor]:
    """Return the gradients of block and table from the `sums` (B, K, D) of each sample."""
    dblock, dtable = block.new_empty(block.shape), table.new_empty(table.shape)
    rewards, n_bins = table.shape[:2]
    width = dblock.numel()
    columns = min(512, power_of_2(width))
    table_kernel[(rewards * n_bins + 1, ceil_div(width, columns))](
        sums_ptr=sums,
        bin_by_sample_ptr=bin_by_sample,
        dblock_ptr=dblock,
        dtable_ptr=dtable,
        n_samples=len(sums),
        n_bins=max(1, n_bins),
        REWARDS=rewards,
        WIDTH=width,
        SAMPLES=16,
        COLUMNS=columns,
        num_warps=4,
    )
    return [dblock, dtable]


def _rows_of(modulation: list[Tensor]) -> tuple[Tensor | None, Tensor, Tensor]:
    """Views (B, D) of the gate, None where K = 2, shift and scale."""
    rows: Sequence[Tensor] = modulation[0].unbind(1) if len(modulation) == 1 else modulation
    *gate, shift, scale = rows
    return (gate[0] if gate else None), shift, scale


def _last_dim_contiguous(tensor: Tensor) -> Tensor:
    """Copy the tensor only if its last dimension is strided; kernels take any other strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _row_arguments(**rows: Tensor | None) -> dict[str, Any]:
    """Pointer and sample stride of each row of modulation."""
    arguments: dict[str, Any] = {}
    for name, row in rows.items():
        row = None if row is None else _last_dim_contiguous(row)
        arguments[f"{name}_ptr"] = row
        arguments[f"{name.upper()}_STRIDE"] = 0 if row is None else row.stride(0)
    return arguments


def _reward_arguments(rewards: list[Tensor]) -> dict[str, Any]:
    """The reward arguments of both token kernels; without rewards None and 0, compiled away."""
    if not rewards:
        pointers = ("block_ptr", "table_ptr", "bins_ptr", "keep_ptr")
        sizes = ("table_stride", "n_bins", "REWARDS", "BLOCK_STRIDE", "BIN_STRIDE", "PART_STRIDE")
        return {**dict.fromkeys(pointers), **dict.fromkeys(sizes, 0)}
    block, table, bins, keep = rewards
    block, table = _last_dim_contiguous(block), _last_dim_contiguous(table)
    keep = keep if keep.dtype == torch.bool else keep != 0
    return {
        "block_ptr": block,
        "table_ptr": table,
        "table_stride": table.stride(0),
        "n_bins": table.shape[1],
        "bins_ptr": bins.contiguous(),
        "keep_ptr": keep.contiguous().view(torch.uint8),
        "BLOCK_STRIDE": block.stride(0),
        "BIN_STRIDE": table.stride(1),
        "PART_STRIDE": table.stride(2),
        "REWARDS": table.shape[0],
    }
