"""SwiGLU against its formula."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from miro_kernels import swiglu


def by_formula(packed: Tensor) -> Tensor:
    a, b = packed.double().tensor_split(2, -1)
    return a / (1 + (-a).exp()) * b


@pytest.mark.parametrize("shape", [(2, 3, 8), (2,), (5, 246), (1, 7, 2000), (0, 4, 6), (3, 0)])
def test_it_matches_its_formula(draw: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    packed = draw(*shape) * 4

    out = swiglu(packed)

    assert out.shape == (*shape[:-1], shape[-1] // 2)
    torch.testing.assert_close(out, by_formula(packed), rtol=1e-12, atol=1e-12)


def test_a_strided_argument_gives_the_result_of_a_contiguous_one(
    draw: Callable[..., Tensor],
) -> None:
    packed = draw(8, 5, 3).transpose(0, 2)

    torch.testing.assert_close(swiglu(packed), swiglu(packed.contiguous()))


def test_bf16_results_are_exact_up_to_one_rounding(draw: Callable[..., Tensor]) -> None:
    packed = draw(3, 5, 246, dtype=torch.bfloat16) * 6

    out = swiglu(packed)

    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), by_formula(packed), rtol=2**-8, atol=1e-6)


def test_large_inputs_do_not_overflow() -> None:
    out = swiglu(torch.tensor([[-200.0, 200.0, 3.0, 3.0]]))

    assert out.tolist() == [[0.0, 600.0]]


def test_it_passes_gradcheck(draw: Callable[..., Tensor]) -> None:
    assert torch.autograd.gradcheck(swiglu, [draw(2, 3, 6).requires_grad_()])


def test_an_odd_last_dimension_raises(draw: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="swiglu: packed.*even.*got 7"):
        swiglu(draw(2, 7))
