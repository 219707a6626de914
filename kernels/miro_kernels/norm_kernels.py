"""The kernels of every adaptive layer norm: adaln and reward_adaln, with and without the gate.

    m  = base[b] + block + Σ_r keep[b, r] · table[r, bins[b, r]]     block and table: reward_adaln
    x′ = x + gate · branch                                           only with a branch; else x
    h  = x̂ · (1 + scale) + shift       x̂ = (x′ − mean) · rstd       gate, shift, scale: rows of m

Backward, with g = dh · (1 + scale) and means over the channels:

    dx′ = rstd · (g − mean(g) − x̂ · mean(g · x̂)) + what reaches x′ from elsewhere
    dx = dx′        dbranch = gate · dx′
    dgate = Σ dx′ · branch        dscale = Σ dh · x̂        dshift = Σ dh

The sums are over a sample's tokens. A program walks over up to CHUNK of them and writes its sums to
fp32 partials (B, chunks, K, D); a second kernel folds the chunks, in a fixed order, into the
gradient of base, and a third adds those over the samples into block's and table's. Saved for
backward: x′, branch, and each row's mean and rstd.

Bytes an element in bf16, the least possible: forward x, h (4) or x, branch, x′, h (8); backward
x, dh, dx (6) or x′, branch, dh, dx′, dx, dbranch (12; 10 where x′ goes to the norm alone).
"""

# pyright: reportGeneralTypeIssues=false
# (tl.range and tl.static_range are loops to the compiler and not to Python.)

from __future__ import annotations

from miro_kernels._triton import fold_partials, jit, tl


@jit
def _modulation(
    base_ptr, part: tl.constexpr, rewards, sample, columns, inside, REWARDS: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, LEVEL_STRIDE: tl.constexpr, PART_STRIDE: tl.constexpr,
):  # fmt: skip
    """One row of m in fp32, summed in registers; base_ptr is at the row of base."""
    block, table, table_reward, levels, bins, keep = rewards
    total = tl.load(base_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if block is not None:
        offset = tl.load(block + part * BLOCK_STRIDE + columns, mask=inside, other=0.0)
        total += offset.to(tl.float32)
    for reward in tl.static_range(REWARDS):
        level = tl.load(bins + sample * REWARDS + reward)
        known = tl.load(keep + sample * REWARDS + reward) != 0
        there = (level >= 0) & (level < levels)
        row = table + reward * table_reward + level * LEVEL_STRIDE + part * PART_STRIDE
        added = tl.load(row + columns, mask=inside & (known & there), other=0.0)
        # A level that the table does not have must not pass for a reward that is not known.
        total += tl.where(known & (there == 0), float("nan"), added.to(tl.float32))
    return total


@jit
def forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, block_ptr, table_ptr, table_reward, levels,
    bins_ptr, keep_ptr, sum_ptr, h_ptr, stats_ptr, n_rows, n_tokens, n_chunks, eps,
    GATE_STRIDE: tl.constexpr, SHIFT_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, LEVEL_STRIDE: tl.constexpr, PART_STRIDE: tl.constexpr,
    PARTS: tl.constexpr, REWARDS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x′, h and the rows' mean and rstd, for CHUNK tokens of one sample, ROWS at a time."""
    sample = (tl.program_id(0) // n_chunks).to(tl.int64)
    first = tl.program_id(0) % n_chunks * CHUNK
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    rewards = (block_ptr, table_ptr, table_reward, levels, bins_ptr, keep_ptr)
    shift = _modulation(
        shift_ptr + sample * SHIFT_STRIDE, PARTS - 2, rewards, sample, columns, inside, REWARDS,
        BLOCK_STRIDE, LEVEL_STRIDE, PART_STRIDE,
    )  # fmt: skip
    scale = _modulation(
        scale_ptr + sample * SCALE_STRIDE, PARTS - 1, rewards, sample, columns, inside, REWARDS,
        BLOCK_STRIDE, LEVEL_STRIDE, PART_STRIDE,
    )  # fmt: skip
    if branch_ptr is not None:
        gate = _modulation(
            gate_ptr + sample * GATE_STRIDE, 0, rewards, sample, columns, inside, REWARDS,
            BLOCK_STRIDE, LEVEL_STRIDE, PART_STRIDE,
        )  # fmt: skip
    for start in tl.range(first, tl.minimum(first + CHUNK, n_tokens), ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        present = token < n_tokens
        row = sample * n_tokens + token
        place = row[:, None] * D + columns[None, :]
        mask = present[:, None] & inside[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + place, mask=mask, other=0.0).to(tl.float32)
            # Rounded before the norm, so that h is the norm of the x′ returned.
            rounded = (x + gate[None, :] * branch).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + place, rounded, mask=mask)
            x = rounded.to(tl.float32)
        mean = tl.sum(x, 1) / D
        centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
        h = centred * rstd[:, None] * (1 + scale)[None, :] + shift[None, :]
        tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=mask)
        tl.store(stats_ptr + row, mean, mask=present)
        tl.store(stats_ptr + n_rows + row, rstd, mask=present)


@jit
def backward_kernel(
    x_ptr, branch_ptr, dh_ptr, dsum_ptr, gate_ptr, scale_ptr, block_ptr, table_ptr, table_reward,
    levels, bins_ptr, keep_ptr, stats_ptr, dx_ptr, dbranch_ptr, partials_ptr, n_rows, n_tokens,
    n_chunks, GATE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, LEVEL_STRIDE: tl.constexpr, PART_STRIDE: tl.constexpr,
    PARTS: tl.constexpr, REWARDS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, dbranch and this chunk's sums of dgate, dshift, dscale; x_ptr is x′ where gated."""
    sample = (tl.program_id(0) // n_chunks).to(tl.int64)
    first = tl.program_id(0) % n_chunks * CHUNK
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    rewards = (block_ptr, table_ptr, table_reward, levels, bins_ptr, keep_ptr)
    scale = _modulation(
        scale_ptr + sample * SCALE_STRIDE, PARTS - 1, rewards, sample, columns, inside, REWARDS,
        BLOCK_STRIDE, LEVEL_STRIDE, PART_STRIDE,
    )  # fmt: skip
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    dgate = tl.zeros((BLOCK,), tl.float32)
    if branch_ptr is not None:
        gate = _modulation(
            gate_ptr + sample * GATE_STRIDE, 0, rewards, sample, columns, inside, REWARDS,
            BLOCK_STRIDE, LEVEL_STRIDE, PART_STRIDE,
        )  # fmt: skip
    for start in tl.range(first, tl.minimum(first + CHUNK, n_tokens), ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        present = token < n_tokens
        row = sample * n_tokens + token
        place = row[:, None] * D + columns[None, :]
        mask = present[:, None] & inside[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + place, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row, mask=present, other=0.0)
        rstd = tl.load(stats_ptr + n_rows + row, mask=present, other=0.0)
        normed = tl.where(inside[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)
        dnormed = dh * (1 + scale)[None, :]
        along_one = tl.sum(dnormed, 1) / D
        along_normed = tl.sum(dnormed * normed, 1) / D
        dx = rstd[:, None] * (dnormed - along_one[:, None] - normed * along_normed[:, None])
        dshift += tl.sum(dh, 0)
        dscale += tl.sum(dh * normed, 0)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + place, mask=mask, other=0.0).to(tl.float32)
            dgate += tl.sum(dx * branch, 0)
            dbranch = (gate[None, :] * dx).to(dbranch_ptr.dtype.element_ty)
            tl.store(dbranch_ptr + place, dbranch, mask=mask)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = partials_ptr + tl.program_id(0).to(tl.int64) * PARTS * D + columns
    if branch_ptr is not None:
        tl.store(partial, dgate, mask=inside)
    tl.store(partial + (PARTS - 2) * D, dshift, mask=inside)
    tl.store(partial + (PARTS - 1) * D, dscale, mask=inside)


@jit
def fold_kernel(
    partials_ptr, dgate_ptr, dshift_ptr, dscale_ptr, sums_ptr, bins_ptr, keep_ptr, held_ptr,
    n_chunks, REWARDS: tl.constexpr, STRIDE: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Partials (B, chunks, K, D) to the gradients of a sample's gate, shift and scale.

    With rewards, sums_ptr receives the same in fp32 as (B, K, D), and held_ptr (R, B) the level of
    each known reward, -1 of others: what the table's kernel reads again and again, side by side.
    """
    sample = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out = sample.to(tl.int64) * STRIDE
    dshift = fold_partials(
        partials_ptr, dshift_ptr + out, sample, PARTS - 2, n_chunks, columns, PARTS, D, ROWS
    )
    dscale = fold_partials(
        partials_ptr, dscale_ptr + out, sample, PARTS - 1, n_chunks, columns, PARTS, D, ROWS
    )
    if sums_ptr is not None:
        row = sums_ptr + sample.to(tl.int64) * PARTS * D + columns
        tl.store(row + (PARTS - 2) * D, dshift, mask=columns < D)
        tl.store(row + (PARTS - 1) * D, dscale, mask=columns < D)
        if tl.program_id(1) == 0:
            for reward in tl.static_range(REWARDS):
                level = tl.load(bins_ptr + sample * REWARDS + reward)
                known = tl.load(keep_ptr + sample * REWARDS + reward) != 0
                held = tl.where(known, level, -1).to(tl.int32)
                tl.store(held_ptr + reward * tl.num_programs(0) + sample, held)
    if dgate_ptr is not None:
        dgate = fold_partials(
            partials_ptr, dgate_ptr + out, sample, 0, n_chunks, columns, PARTS, D, ROWS
        )
        if sums_ptr is not None:
            tl.store(row, dgate, mask=columns < D)


@jit
def table_kernel(
    sums_ptr, held_ptr, dblock_ptr, dtable_ptr, n_samples, levels,
    REWARDS: tl.constexpr, WIDTH: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row of dtable: the sum over the samples at this reward's level, in their order.

    The row after the table's last is dblock, which every sample has a part in.
    """
    row = tl.program_id(0)
    reward, level = row // levels, row % levels
    of_block = row == REWARDS * levels
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, n_samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        present = sample < n_samples
        ranked = present & (of_block == 0)
        held = tl.load(held_ptr + reward * n_samples + sample, mask=ranked, other=-1)
        chosen = present & (of_block | (held == level))
        place = sample.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        mask = chosen[:, None] & inside[None, :]
        total += tl.sum(tl.load(sums_ptr + place, mask=mask, other=0.0), 0)
    if of_block:
        tl.store(dblock_ptr + columns, total.to(dblock_ptr.dtype.element_ty), mask=inside)
    else:
        place = row.to(tl.int64) * WIDTH + columns
        tl.store(dtable_ptr + place, total.to(dtable_ptr.dtype.element_ty), mask=inside)
