"""The kernels of `adaln`, `gated_residual_adaln` and `reward_adaln`.

    m  = base[b] + block + Σ_r keep[b, r] · table[r, bins[b, r]]     block, table: reward_adaln only
    x′ = x + gate · branch                                           x without a branch
    h  = x̂ · (1 + scale) + shift       x̂ = (x′ − mean) · rstd       gate, shift, scale: rows of m

Backward, with g = dh · (1 + scale) and means over the channels:

    dx′ = rstd · (g − mean(g) − x̂ · mean(g · x̂)) + the gradient that reaches x′ another way
    dx = dx′        dbranch = gate · dx′
    dgate = Σ dx′ · branch        dscale = Σ dh · x̂        dshift = Σ dh        over tokens
    dbase[b] = dm[b]    dblock = Σ_b dm[b]    dtable[r, l] = Σ_b keep[b, r] · [bins[b, r] = l] dm[b]

A program processes up to CHUNK tokens of one sample, so that it sums m once, and writes its sums of
dgate, dshift and dscale to fp32 partials (B, chunks, K, D). A second kernel reduces the chunks in a
fixed order into dbase, and a third reduces the samples into dblock and dtable: no atomics, so two
runs give the same bits. Saved for backward: x′, branch, and the mean and rstd of each token.

Least bytes per element in bf16: forward x, h (4) or x, branch, x′, h (8); backward x, dh, dx (6) or
x′, branch, dh, dx′, dx, dbranch (12; 10 if only the norm uses x′).
"""

# pyright: reportGeneralTypeIssues=false
# (Triton's tl.range and tl.static_range are not iterable in Python.)

from __future__ import annotations

from miro_kernels._triton import jit, reduce_rows, tl


@jit
def _modulation(
    base_ptr, part: tl.constexpr, rewards, sample, columns, col_mask, REWARDS: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, BIN_STRIDE: tl.constexpr, PART_STRIDE: tl.constexpr,
):  # fmt: skip
    """One row of m, summed in fp32 registers; base_ptr points at the row of base."""
    block, table, table_stride, n_bins, bins, keep = rewards
    total = tl.load(base_ptr + columns, mask=col_mask, other=0.0).to(tl.float32)
    if block is not None:
        offset = tl.load(block + part * BLOCK_STRIDE + columns, mask=col_mask, other=0.0)
        total += offset.to(tl.float32)
    for reward in tl.static_range(REWARDS):
        bin = tl.load(bins + sample * REWARDS + reward)
        known = tl.load(keep + sample * REWARDS + reward) != 0
        in_table = (bin >= 0) & (bin < n_bins)
        row = table + reward * table_stride + bin * BIN_STRIDE + part * PART_STRIDE
        added = tl.load(row + columns, mask=col_mask & (known & in_table), other=0.0)
        # NaN for a bin out of range: adding nothing would hide it as a missing reward.
        total += tl.where(known & (in_table == 0), float("nan"), added.to(tl.float32))
    return total


@jit
def forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, block_ptr, table_ptr, table_stride, n_bins,
    bins_ptr, keep_ptr, residual_ptr, h_ptr, stats_ptr, n_rows, n_tokens, n_chunks, eps,
    GATE_STRIDE: tl.constexpr, SHIFT_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, BIN_STRIDE: tl.constexpr, PART_STRIDE: tl.constexpr,
    PARTS: tl.constexpr, REWARDS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute x′, h, mean and rstd of CHUNK tokens of one sample, ROWS at a time."""
    sample = (tl.program_id(0) // n_chunks).to(tl.int64)
    first = tl.program_id(0) % n_chunks * CHUNK
    columns = tl.arange(0, BLOCK)
    col_mask = columns < D
    rewards = (block_ptr, table_ptr, table_stride, n_bins, bins_ptr, keep_ptr)
    shift = _modulation(
        shift_ptr + sample * SHIFT_STRIDE, PARTS - 2, rewards, sample, columns, col_mask, REWARDS,
        BLOCK_STRIDE, BIN_STRIDE, PART_STRIDE,
    )  # fmt: skip
    scale = _modulation(
        scale_ptr + sample * SCALE_STRIDE, PARTS - 1, rewards, sample, columns, col_mask, REWARDS,
        BLOCK_STRIDE, BIN_STRIDE, PART_STRIDE,
    )  # fmt: skip
    if branch_ptr is not None:
        gate = _modulation(
            gate_ptr + sample * GATE_STRIDE, 0, rewards, sample, columns, col_mask, REWARDS,
            BLOCK_STRIDE, BIN_STRIDE, PART_STRIDE,
        )  # fmt: skip
    for start in tl.range(first, tl.minimum(first + CHUNK, n_tokens), ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        token_mask = token < n_tokens
        row = sample * n_tokens + token
        offsets = row[:, None] * D + columns[None, :]
        mask = token_mask[:, None] & col_mask[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            # Round x′ before the norm, so that h is the norm of the x′ returned.
            rounded = (x + gate[None, :] * branch).to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + offsets, rounded, mask=mask)
            x = rounded.to(tl.float32)
        mean = tl.sum(x, 1) / D
        centred = tl.where(col_mask[None, :], x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
        h = centred * rstd[:, None] * (1 + scale)[None, :] + shift[None, :]
        tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)
        tl.store(stats_ptr + row, mean, mask=token_mask)
        tl.store(stats_ptr + n_rows + row, rstd, mask=token_mask)


@jit
def backward_kernel(
    x_ptr, branch_ptr, dh_ptr, dresidual_ptr, gate_ptr, scale_ptr, block_ptr, table_ptr,
    table_stride, n_bins, bins_ptr, keep_ptr, stats_ptr, dx_ptr, dbranch_ptr, partials_ptr,
    n_rows, n_tokens, n_chunks, GATE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, BIN_STRIDE: tl.constexpr, PART_STRIDE: tl.constexpr,
    PARTS: tl.constexpr, REWARDS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx, dbranch and the chunk's sums of dgate, dshift, dscale; with a branch, x is x′."""
    sample = (tl.program_id(0) // n_chunks).to(tl.int64)
    first = tl.program_id(0) % n_chunks * CHUNK
    columns = tl.arange(0, BLOCK)
    col_mask = columns < D
    rewards = (block_ptr, table_ptr, table_stride, n_bins, bins_ptr, keep_ptr)
    scale = _modulation(
        scale_ptr + sample * SCALE_STRIDE, PARTS - 1, rewards, sample, columns, col_mask, REWARDS,
        BLOCK_STRIDE, BIN_STRIDE, PART_STRIDE,
    )  # fmt: skip
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    dgate = tl.zeros((BLOCK,), tl.float32)
    if branch_ptr is not None:
        gate = _modulation(
            gate_ptr + sample * GATE_STRIDE, 0, rewards, sample, columns, col_mask, REWARDS,
            BLOCK_STRIDE, BIN_STRIDE, PART_STRIDE,
        )  # fmt: skip
    for start in tl.range(first, tl.minimum(first + CHUNK, n_tokens), ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        token_mask = token < n_tokens
        row = sample * n_tokens + token
        offsets = row[:, None] * D + columns[None, :]
        mask = token_mask[:, None] & col_mask[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row, mask=token_mask, other=0.0)
        rstd = tl.load(stats_ptr + n_rows + row, mask=token_mask, other=0.0)
        xhat = tl.where(col_mask[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)
        dnorm = dh * (1 + scale)[None, :]
        mean_dnorm = tl.sum(dnorm, 1) / D
        mean_dnorm_xhat = tl.sum(dnorm * xhat, 1) / D
        dx = rstd[:, None] * (dnorm - mean_dnorm[:, None] - xhat * mean_dnorm_xhat[:, None])
        dshift += tl.sum(dh, 0)
        dscale += tl.sum(dh * xhat, 0)
        if dresidual_ptr is not None:
            dx += tl.load(dresidual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dgate += tl.sum(dx * branch, 0)
            dbranch = (gate[None, :] * dx).to(dbranch_ptr.dtype.element_ty)
            tl.store(dbranch_ptr + offsets, dbranch, mask=mask)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = partials_ptr + tl.program_id(0).to(tl.int64) * PARTS * D + columns
    if branch_ptr is not None:
        tl.store(partial, dgate, mask=col_mask)
    tl.store(partial + (PARTS - 2) * D, dshift, mask=col_mask)
    tl.store(partial + (PARTS - 1) * D, dscale, mask=col_mask)


@jit
def reduce_kernel(
    partials_ptr, dgate_ptr, dshift_ptr, dscale_ptr, sums_ptr, bins_ptr, keep_ptr,
    bin_by_sample_ptr, n_chunks, REWARDS: tl.constexpr, STRIDE: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the partials (B, chunks, K, D) over a sample's chunks into dgate, dshift and dscale.

    With rewards, also store the sums in fp32 (B, K, D), and bin_by_sample (R, B): the bin of each
    reward, -1 if it is missing. The table's kernel loads a reward's bins contiguously from it.
    """
    sample = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out = sample.to(tl.int64) * STRIDE
    dshift = reduce_rows(
        partials_ptr, dshift_ptr + out, sample, PARTS - 2, n_chunks, columns, PARTS, D, ROWS
    )
    dscale = reduce_rows(
        partials_ptr, dscale_ptr + out, sample, PARTS - 1, n_chunks, columns, PARTS, D, ROWS
    )
    if sums_ptr is not None:
        row = sums_ptr + sample.to(tl.int64) * PARTS * D + columns
        tl.store(row + (PARTS - 2) * D, dshift, mask=columns < D)
        tl.store(row + (PARTS - 1) * D, dscale, mask=columns < D)
        if tl.program_id(1) == 0:
            for reward in tl.static_range(REWARDS):
                bin = tl.load(bins_ptr + sample * REWARDS + reward)
                known = tl.load(keep_ptr + sample * REWARDS + reward) != 0
                bin = tl.where(known, bin, -1).to(tl.int32)
                tl.store(bin_by_sample_ptr + reward * tl.num_programs(0) + sample, bin)
    if dgate_ptr is not None:
        dgate = reduce_rows(
            partials_ptr, dgate_ptr + out, sample, 0, n_chunks, columns, PARTS, D, ROWS
        )
        if sums_ptr is not None:
            tl.store(row, dgate, mask=columns < D)


@jit
def table_kernel(
    sums_ptr, bin_by_sample_ptr, dblock_ptr, dtable_ptr, n_samples, n_bins,
    REWARDS: tl.constexpr, WIDTH: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum one row of dtable over the samples in its bin, in their order.

    The program after the table's last row sums dblock over all samples.
    """
    row = tl.program_id(0)
    reward, bin = row // n_bins, row % n_bins
    is_block = row == REWARDS * n_bins
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    col_mask = columns < WIDTH
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, n_samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        in_batch = sample < n_samples
        bin_mask = in_batch & (is_block == 0)
        bins = tl.load(bin_by_sample_ptr + reward * n_samples + sample, mask=bin_mask, other=-1)
        selected = in_batch & (is_block | (bins == bin))
        offsets = sample.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        mask = selected[:, None] & col_mask[None, :]
        total += tl.sum(tl.load(sums_ptr + offsets, mask=mask, other=0.0), 0)
    if is_block:
        tl.store(dblock_ptr + columns, total.to(dblock_ptr.dtype.element_ty), mask=col_mask)
    else:
        offsets = row.to(tl.int64) * WIDTH + columns
        tl.store(dtable_ptr + offsets, total.to(dtable_ptr.dtype.element_ty), mask=col_mask)
