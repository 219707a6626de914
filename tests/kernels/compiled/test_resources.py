"""The lab reads resources and faults from compiled code, for GPUs that are not present."""

# Launches pass plain numbers for parameters annotated tl.constexpr, and num_warps to Triton.
# pyright: reportArgumentType=false, reportCallIssue=false

import pytest
import torch
import triton
import triton.language as tl

from miro_kernels.lab.resources import MACHINES, Compiled, capture, occupancy

CUDA = ("sm_80", "sm_90", "sm_100")


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < size, other=0.0), mask=i < size)


@triton.jit
def rows_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = sum of each row: one number per row is stored."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.load(x_ptr + row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(y_ptr + row, tl.sum(x, 1))


@triton.jit
def centred_kernel(x_ptr, BLOCK: tl.constexpr):
    """x - mean(x) in place, which needs all of x in registers."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x - tl.sum(x) / BLOCK)


@triton.jit
def accumulate_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(y_ptr, tl.sum(x))


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, steps, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    offsets = i[:, None] * SIZE + i[None, :]
    c = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + step * SIZE * SIZE + offsets)
        b = tl.load(b_ptr + step * SIZE * SIZE + offsets)
        c = tl.dot(a, b, c)
    tl.store(c_ptr + offsets, c)


def compile_copy(target: str, shift: int = 0) -> Compiled:
    x = torch.empty(4096 + 16, dtype=torch.bfloat16)
    with capture(target) as kernels:
        copy_kernel[(2,)](x[shift:], x, 4096, BLOCK=2048)
    return kernels[0]


def compile_product(target: str, size: int, **options: int) -> Compiled:
    a = torch.empty(4, size, size, dtype=torch.bfloat16)
    with capture(target) as kernels:
        product_kernel[(1,)](a, a, torch.empty(size, size), 4, SIZE=size, **options)
    return kernels[0]


@pytest.mark.parametrize("target", MACHINES)
def test_an_aligned_copy_has_wide_accesses_and_no_spills(target: str) -> None:
    kernel = compile_copy(target)

    assert kernel.kernel == "copy_kernel" and kernel.target == target
    assert kernel.wide > 0 and kernel.narrow == kernel.spills == kernel.atomics == kernel.mma == 0
    assert kernel.fits and 0.5 <= kernel.occupancy <= 1


@pytest.mark.parametrize("target", MACHINES)
def test_a_misaligned_copy_has_narrow_accesses(target: str) -> None:
    assert compile_copy(target, shift=1).narrow > 0


@pytest.mark.parametrize("target", MACHINES)
def test_a_store_of_one_number_per_row_is_not_narrow(target: str) -> None:
    with capture(target) as kernels:
        rows_kernel[(4,)](torch.empty(64, 1024), torch.empty(64), ROWS=16, COLUMNS=1024)

    assert kernels[0].wide > 0 and kernels[0].narrow == 0


@pytest.mark.parametrize("target", MACHINES)
def test_an_atomic_is_counted(target: str) -> None:
    with capture(target) as kernels:
        accumulate_kernel[(4,)](torch.empty(1024), torch.empty(1), BLOCK=256)

    assert kernels[0].atomics > 0


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize(("warps", "spills"), [(8, False), (1, True)])
def test_spills_are_counted(target: str, warps: int, spills: bool) -> None:
    """64 KiB fit in the registers of eight warps, but not of one."""
    with capture(target) as kernels:
        centred_kernel[(1,)](torch.empty(16384), BLOCK=16384, num_warps=warps)

    assert (kernels[0].spills > 0) == spills


@pytest.mark.parametrize("target", CUDA)
def test_too_much_shared_memory_does_not_fit(target: str) -> None:
    kernel = compile_product(target, 256, num_warps=8, num_stages=4)

    assert not kernel.fits and kernel.occupancy == 0


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")],
)
def test_a_matrix_product_uses_the_tensor_cores(target: str, instruction: str) -> None:
    kernel = compile_product(target, 128, num_warps=4 if target == "sm_100" else 8)

    assert kernel.mma > 0 and all(name.startswith(instruction) for name in kernel.matrix)


def test_a_kernel_launched_twice_is_listed_once_and_does_not_run() -> None:
    x, y = torch.zeros(2048), torch.ones(2048)

    with capture("sm_90") as kernels:
        for _ in range(2):
            copy_kernel[(1,)](x, y, 2048, BLOCK=2048)

    assert len(kernels) == 1 and y.eq(1).all()


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [
        (32, 4, 0, 1.0),
        # NVIDIA's calculator for compute capability 9.0: registers, then shared memory, bind.
        (128, 4, 0, 0.25),
        (168, 8, 0, 0.125),
        (255, 4, 0, 0.125),
        (64, 4, 100 * 1024, 0.125),
    ],
)
def test_occupancy(registers: int, warps: int, shared: int, expected: float) -> None:
    assert occupancy(MACHINES["sm_90"], registers, warps, shared) == expected
