"""Adaptive layer norm against loops over tokens, and its gradients against differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from miro_kernels import adaln, gated_residual_adaln

SHAPES = [(2, 3, 8), (1, 1, 1), (3, 5, 123), (1, 7, 1000), (0, 4, 8), (2, 0, 8)]


def adaln_by_loops(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            row = x[b, n]
            mean = row.sum() / len(row)
            variance = ((row - mean) ** 2).sum() / len(row)
            out[b, n] = (row - mean) / (variance + eps) ** 0.5 * (1 + scale[b]) + shift[b]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_adaln_matches_its_formula(draw: Callable[..., Tensor], shape: tuple, eps: float) -> None:
    x, shift, scale = draw(*shape), draw(shape[0], shape[2]), draw(shape[0], shape[2])

    out = adaln(x, shift, scale, eps)

    assert out.shape == shape
    torch.testing.assert_close(out, adaln_by_loops(x, shift, scale, eps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual_adaln_matches_its_formula(
    draw: Callable[..., Tensor], shape: tuple
) -> None:
    x, branch = draw(*shape), draw(*shape)
    gate, shift, scale = (draw(shape[0], shape[2]) for _ in range(3))

    residual, h = gated_residual_adaln(x, branch, gate, shift, scale, 1e-5)

    expected = x + gate[:, None] * branch
    torch.testing.assert_close(residual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        h, adaln_by_loops(expected, shift, scale, 1e-5), rtol=1e-9, atol=1e-9
    )


def test_strided_arguments_give_the_results_of_contiguous_ones(draw: Callable[..., Tensor]) -> None:
    x, branch = draw(5, 4, 3).transpose(0, 2), draw(3, 4, 10)[..., ::2]
    gate, shift, scale = draw(3, 15).unflatten(1, (5, 3)).unbind(2)

    plain = gated_residual_adaln(
        *(z.contiguous() for z in (x, branch, gate, shift, scale)), eps=1e-6
    )

    torch.testing.assert_close(gated_residual_adaln(x, branch, gate, shift, scale), plain)
    torch.testing.assert_close(
        adaln(x, shift, scale), adaln(x.contiguous(), shift.contiguous(), scale.contiguous())
    )


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_low_precision_results_are_exact_up_to_one_rounding(
    draw: Callable[..., Tensor], dtype: torch.dtype, ulp: float
) -> None:
    x, branch = draw(2, 5, 123, dtype=dtype), draw(2, 5, 123, dtype=dtype)
    gate, shift, scale = (draw(2, 123, dtype=dtype) for _ in range(3))

    residual, h = gated_residual_adaln(x, branch, gate, shift, scale)
    alone = adaln(x, shift, scale)

    assert residual.dtype == h.dtype == alone.dtype == dtype
    wide = [z.double() for z in (x, branch, gate, shift, scale)]
    exact, _ = gated_residual_adaln(*wide, eps=1e-6)
    # Rounding costs half an ulp, and the fp32 arithmetic a little more near zero.
    torch.testing.assert_close(residual.double(), exact, rtol=ulp, atol=1e-5)
    torch.testing.assert_close(
        alone.double(), adaln(wide[0], wide[3], wide[4]), rtol=ulp, atol=1e-5
    )
    assert torch.equal(h, adaln(residual, shift, scale)), "h is the norm of the x′ returned"


def test_fp32_modulation_is_not_rounded_to_the_dtype_of_x(
    draw: Callable[..., Tensor],
) -> None:
    x = draw(1, 3, 64, dtype=torch.bfloat16)
    shift, scale = draw(1, 64, dtype=torch.float32), draw(1, 64, dtype=torch.float32)

    out = adaln(x, shift, scale)

    exact = adaln(x.double(), shift.double(), scale.double())
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


def test_the_variance_is_accurate_with_a_large_mean(draw: Callable[..., Tensor]) -> None:
    x = draw(1, 4, 256, dtype=torch.float32) + 1000
    shift, scale = torch.zeros(1, 256), torch.zeros(1, 256)

    exact = adaln(x.double(), shift.double(), scale.double())

    torch.testing.assert_close(adaln(x, shift, scale).double(), exact, rtol=1e-3, atol=1e-3)


def test_adaln_passes_gradcheck(draw: Callable[..., Tensor]) -> None:
    arguments = [draw(2, 3, 5), draw(2, 5), draw(2, 5)]

    assert torch.autograd.gradcheck(adaln, [z.requires_grad_() for z in arguments])


def test_gated_residual_adaln_passes_gradcheck(draw: Callable[..., Tensor]) -> None:
    tokens = [draw(2, 3, 5) for _ in range(2)]
    arguments = [z.requires_grad_() for z in (*tokens, *(draw(2, 5) for _ in range(3)))]

    assert torch.autograd.gradcheck(gated_residual_adaln, arguments)


@pytest.mark.parametrize(
    ("changed", "shape"),
    [("shift", (2, 7)), ("scale", (3, 8)), ("gate", (2, 3, 8)), ("branch", (2, 4, 8))],
)
def test_a_wrong_shape_raises_with_the_argument(
    draw: Callable[..., Tensor], changed: str, shape: tuple
) -> None:
    arguments: dict[str, Any] = {"x": draw(2, 3, 8), "branch": draw(2, 3, 8)}
    arguments |= {name: draw(2, 8) for name in ("gate", "shift", "scale")}
    expected = tuple(arguments[changed].shape)
    arguments[changed] = draw(*shape)

    with pytest.raises(ValueError) as error:
        gated_residual_adaln(**arguments)

    for part in ("gated_residual_adaln", changed, str(expected), str(shape)):
        assert part in str(error.value)


def test_a_wrong_rank_raises_with_the_argument(draw: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"adaln: x must be \(B, N, D\), got shape \(3, 8\)"):
        adaln(draw(3, 8), draw(3, 8), draw(3, 8))
