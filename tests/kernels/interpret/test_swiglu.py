"""SwiGLU's kernels against the reference."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from miro_kernels import swiglu, use_backend
from miro_kernels.lab import testing
from miro_kernels.swiglu import swiglu_op, swiglu_reference

Draw = Callable[..., Tensor]
SHAPES = [(1, 1, 8), (2,), (5, 246), (2, 7, 2000), (3, 11, 1024)]


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_match_the_reference(
    draw: Draw, device: str, shape: tuple, dtype: torch.dtype
) -> None:
    packed = (draw(*shape) * 4).to(device, dtype).requires_grad_()

    testing.assert_close(swiglu, swiglu_reference, {"packed": packed})


def test_a_strided_argument_matches_the_reference(draw: Draw, device: str) -> None:
    packed = draw(8, 5, 3).transpose(0, 2).to(device, torch.float32).requires_grad_()

    testing.assert_close(
        swiglu, swiglu_reference, {"packed": packed}, gradient=testing.transposed_gradient
    )


def test_large_values_neither_overflow_nor_underflow(device: str) -> None:
    packed = torch.tensor([[-200.0, 200.0, 6e4, 3.0, 3.0, 1.0]], device=device).half()
    packed.requires_grad_()

    testing.assert_close(swiglu, swiglu_reference, {"packed": packed})


@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0)], ids=str)
def test_an_empty_input_gives_an_empty_output_and_gradient(device: str, shape: tuple) -> None:
    packed = torch.zeros(shape, device=device, requires_grad=True)

    out = swiglu(packed)
    out.sum().backward()

    assert out.shape == (*shape[:-1], shape[-1] // 2)
    assert packed.grad is not None and packed.grad.shape == shape


def test_the_registered_op_passes_opcheck(draw: Draw, device: str) -> None:
    packed = draw(2, 3, 8).to(device, torch.float32).requires_grad_()

    torch.library.opcheck(swiglu_op, (packed,))
