"""The lab detects faults: each test runs a small kernel with one deliberate fault."""

# Launches pass plain numbers for parameters annotated tl.constexpr.
# pyright: reportArgumentType=false

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from miro_kernels.lab import testing
from miro_kernels.lab.traffic import KernelFault, Traffic

pytestmark = pytest.mark.usefixtures("count")
Count = Callable[..., AbstractContextManager[Traffic]]


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr, SLACK: tl.constexpr):
    """y = x, with a mask that is SLACK elements too long."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < size + SLACK, other=0.0), mask=i < size)


@triton.jit
def overlapping_kernel(x_ptr, y_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """y = x, with programs STEP elements apart, which overlap if STEP < BLOCK."""
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def neighbour_kernel(x_ptr, BLOCK: tl.constexpr):
    """x[i] = x[i + BLOCK] in place: reads elements that the next program writes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + i + BLOCK)
    tl.store(x_ptr + i, value)


@triton.jit
def sum_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr, FILLED: tl.constexpr):
    """y = sum(x); the masked load has other=0 only if FILLED."""
    i = tl.arange(0, BLOCK)
    if FILLED:
        x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    else:
        x = tl.load(x_ptr + i, mask=i < size)
    tl.store(y_ptr, tl.sum(x))


@triton.jit
def accumulate_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(y_ptr, tl.sum(x))


@triton.jit
def table_kernel(table_ptr, BLOCK: tl.constexpr):
    """y = x, for x and y given by a table of their addresses."""
    i = tl.arange(0, BLOCK)
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    y_ptr = tl.load(table_ptr + 1).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def descriptor_kernel(x, y, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    y.store([row, 0], x.load([row, 0]))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    offsets = i[:, None] * SIZE + i[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(c_ptr + offsets, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    """Elementwise operations in the arguments' dtype."""
    i = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + BLOCK + i, a * b)
    tl.store(out_ptr + 2 * BLOCK + i, tl.where(a < b, a, -b))
    tl.store(out_ptr + 3 * BLOCK + i, tl.maximum(a, b))
    tl.store(out_ptr + 4 * BLOCK + i, (a.to(tl.float32) / b.to(tl.float32)).to(a.dtype))


def test_the_bytes_of_a_kernel_without_faults_are_counted(count: Count) -> None:
    x, y = torch.randn(1000), torch.empty(1000)

    with count() as traffic:
        copy_kernel[(4,)](x, y, 1000, BLOCK=256, SLACK=0)

    assert torch.equal(x, y)
    assert traffic.bytes == traffic.distinct == 2 * 4000
    assert [(launch.kernel, launch.grid) for launch in traffic.launches] == [
        ("copy_kernel", (4, 1, 1))
    ]


def test_sectors_and_not_elements_are_counted(count: Count) -> None:
    x, y = torch.randn(256, 16)[:, 0], torch.empty(256)

    with count(check=False) as traffic:
        copy_kernel[(1,)](x, y, 256, BLOCK=256, SLACK=0)

    assert traffic.launches[0].stored == 1024
    # The kernel ignores the stride of 16: its 256 addresses contain 16 elements of the view.
    assert traffic.faults and traffic.launches[0].loaded == 16 * 32


def test_a_read_out_of_bounds_is_caught(count: Count) -> None:
    x, y = torch.randn(1000), torch.empty(1000)

    with pytest.raises(KernelFault, match=r"program \(3, 0, 0\) loads 1 elements out of bounds"):
        with count():
            copy_kernel[(4,)](x, y, 1000, BLOCK=256, SLACK=1)


def test_a_read_between_the_rows_of_a_view_is_caught(count: Count) -> None:
    x, y = torch.randn(16, 128)[:, :64], torch.empty(16 * 64)

    with pytest.raises(KernelFault, match="out of bounds"):
        with count():
            copy_kernel[(4,)](x, y, 1024, BLOCK=256, SLACK=0)


@pytest.mark.parametrize("step", [64, 60])
def test_two_programs_that_write_one_address_are_caught(count: Count, step: int) -> None:
    x, y = torch.randn(256), torch.empty(256)

    with count(check=False) as traffic:
        overlapping_kernel[(4,)](x, y, STEP=step, BLOCK=64)

    raced = "program (0, 0, 0) writes what program (1, 0, 0) writes"
    assert any(raced in fault for fault in traffic.faults) == (step < 64)


def test_a_program_that_reads_what_another_writes_is_caught(count: Count) -> None:
    with pytest.raises(KernelFault, match=r"\(0, 0, 0\) reads what program \(1, 0, 0\) writes"):
        with count():
            neighbour_kernel[(3,)](torch.randn(256), BLOCK=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_masked_load_without_other_is_caught_and_nan(count: Count, dtype: torch.dtype) -> None:
    x, y = torch.randn(40).to(dtype), torch.empty(1, dtype=dtype)
    with count():
        sum_kernel[(1,)](x, y, 40, BLOCK=64, FILLED=True)
    assert y.isfinite().all()

    with pytest.raises(KernelFault, match="without `other`"):
        with count():
            sum_kernel[(1,)](x, y, 40, BLOCK=64, FILLED=False)

    assert y.isnan().all()


def test_atomics_are_counted(count: Count) -> None:
    y = torch.zeros(1)

    with count() as traffic:
        accumulate_kernel[(4,)](torch.ones(256), y, BLOCK=64)

    assert y.item() == 256 and traffic.atomics == 4


@pytest.mark.parametrize("rows", [64, 60])
def test_tensor_descriptors_are_counted_and_clipped(count: Count, rows: int) -> None:
    x, y = torch.randn(rows, 32), torch.empty(rows, 32)
    source, target = (TensorDescriptor.from_tensor(tensor, [16, 32]) for tensor in (x, y))

    with count() as traffic:
        descriptor_kernel[(4,)](source, target, ROWS=16)

    assert torch.equal(x, y) and traffic.bytes == 2 * rows * 32 * 4


@pytest.mark.parametrize(("size", "faults"), [(64, 0), (63, 2)])
def test_tensors_behind_a_table_of_pointers_are_checked(
    count: Count, size: int, faults: int
) -> None:
    x, y = torch.zeros(size), torch.empty(size)

    with count(check=False) as traffic:
        table_kernel[(1,)](torch.tensor([x.data_ptr(), y.data_ptr()]), BLOCK=64)

    assert len(traffic.faults) == faults


def test_a_descriptor_larger_than_its_tensor_is_caught(count: Count) -> None:
    x, y = torch.randn(64, 32), torch.empty(64, 32)
    source = TensorDescriptor(x[:60], [64, 32], [32, 1], [16, 32])

    with pytest.raises(KernelFault, match="out of bounds"):
        with count():
            descriptor_kernel[(4,)](source, TensorDescriptor.from_tensor(y, [16, 32]), ROWS=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_arithmetic_is_torchs_bit_for_bit(count: Count, dtype: torch.dtype) -> None:
    a, b = (torch.randn(1024).mul(5).to(dtype) for _ in range(2))
    out = torch.empty(5, 1024, dtype=dtype)

    with count():
        arithmetic_kernel[(1,)](a, b, out, BLOCK=1024)

    expected = torch.stack((a + b, a * b, torch.where(a < b, a, -b), torch.maximum(a, b), a / b))
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("dtype", "precision", "least", "most"),
    [
        (torch.bfloat16, "tf32", 0, 1e-4),
        (torch.float16, "tf32", 0, 1e-4),
        (torch.float32, "ieee", 0, 1e-4),
        # Tensor cores round fp32 operands to tf32 by default.
        (torch.float32, "tf32", 1e-3, 1e-1),
    ],
)
def test_matrix_products_have_the_precision_of_the_hardware(
    count: Count, dtype: torch.dtype, precision: str, least: float, most: float
) -> None:
    a, b = (torch.randn(64, 64).to(dtype) for _ in range(2))
    c = torch.empty(64, 64)

    with count() as traffic:
        dot_kernel[(1,)](a, b, c, SIZE=64, PRECISION=precision)

    assert traffic.multiplications == 64**3
    assert least < (c - a.double() @ b.double()).abs().max() < most


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


class WrongGradient(torch.autograd.Function):
    """scaled(x, weight), with a relative error of 1 / `off` in the gradient of weight."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, off: float) -> Tensor:
        context.save_for_backward(x, weight)
        context.off = off
        return x * weight

    @staticmethod
    def backward(context, *gradients: Tensor) -> tuple:
        x, weight = context.saved_tensors
        grad = (gradients[0] * x).sum(0)
        return gradients[0] * weight, grad * (1 + 1 / context.off), None


@pytest.mark.parametrize(("off", "right"), [(float("inf"), True), (1000, False)])
def test_a_wrong_gradient_is_caught(off: float, right: bool) -> None:
    x, weight = torch.randn(64, 32).requires_grad_(), torch.randn(32).requires_grad_()
    arguments = {"x": x, "weight": weight}

    def op(x: Tensor, weight: Tensor) -> Tensor:
        return WrongGradient.apply(x, weight, off)

    compared = {c.name: c.over_eager <= testing.BAR for c in testing.compare(op, scaled, arguments)}

    assert compared == {"output": True, "d x": True, "d weight": right}


def test_an_extra_nan_and_a_missing_nan_are_caught() -> None:
    x = torch.randn(4, 8)
    x[1, 2] = torch.nan
    arguments = {"x": x, "weight": torch.ones(8)}

    for op in (
        lambda x, weight: (x * weight) + 0 * x.sum(1, keepdim=True),
        lambda x, weight: x.nan_to_num(),
    ):
        with pytest.raises(AssertionError, match="output: not (finite|NaN) where"):
            testing.assert_close(op, scaled, arguments)


def test_a_result_that_changes_between_runs_is_caught() -> None:
    runs = iter((1.0, 1.0 + 2**-23))

    with pytest.raises(AssertionError, match="two runs differ in output"):
        testing.assert_repeats(lambda x: x * next(runs), {"x": torch.ones(3)})


def test_uninitialized_memory_is_nan() -> None:
    assert torch.empty(8).isnan().all()
