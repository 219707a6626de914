"""QK norm and RoPE against complex multiplication."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miro_kernels import qk_norm_rope

Draw = Callable[..., Tensor]


def arguments(
    draw: Draw, shape: tuple[int, ...] = (2, 3, 2, 8), dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    _, tokens, _, size = shape
    angle = draw(tokens, size // 2) * 5
    return {
        "q": draw(*shape, dtype=dtype),
        "k": draw(*shape, dtype=dtype),
        "q_weight": draw(size, dtype=dtype),
        "k_weight": draw(size, dtype=dtype),
        "cos": angle.cos(),
        "sin": angle.sin(),
    }


def by_complex_numbers(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)
    half = x.shape[-1] // 2
    rotated = torch.complex(normed[..., :half], normed[..., half:])
    rotated = rotated * torch.complex(cos, sin)[None, :, None]
    return torch.cat((rotated.real, rotated.imag), -1)


def expected(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    given = {name: value.double() for name, value in given.items()}
    rotation = given["cos"], given["sin"]
    return (
        by_complex_numbers(given["q"], given["q_weight"], *rotation),
        by_complex_numbers(given["k"], given["k_weight"], *rotation),
    )


@pytest.mark.parametrize(
    "shape", [(2, 3, 2, 8), (1, 1, 1, 2), (3, 5, 7, 62), (0, 3, 2, 8), (2, 0, 2, 8)]
)
def test_it_matches_its_formula(draw: Draw, shape: tuple[int, ...]) -> None:
    given = arguments(draw, shape)

    results = qk_norm_rope(**given)

    torch.testing.assert_close(results, expected(given), rtol=1e-9, atol=1e-9)


def test_slices_of_a_packed_projection_give_the_results_of_copies(draw: Draw) -> None:
    q, k, _ = draw(2, 5, 3, 4, 8).unbind(2)
    given = arguments(draw, (2, 5, 4, 8))

    results = qk_norm_rope(**given | {"q": q, "k": k})

    copies = qk_norm_rope(**given | {"q": q.contiguous(), "k": k.contiguous()})
    torch.testing.assert_close(results, copies)


def test_bf16_results_are_exact_up_to_one_rounding(draw: Draw) -> None:
    given = arguments(draw, (2, 7, 3, 64), torch.bfloat16)

    results = qk_norm_rope(**given)

    assert all(result.dtype == torch.bfloat16 for result in results)
    wide = tuple(result.double() for result in results)
    torch.testing.assert_close(wide, expected(given), rtol=2**-8, atol=1e-5)


def test_a_row_of_zeros_stays_zero(draw: Draw) -> None:
    given = arguments(draw)
    given["q"][1, 2] = 0

    q, _ = qk_norm_rope(**given)

    assert torch.equal(q[1, 2], torch.zeros(2, 8, dtype=torch.float64))


def test_it_passes_gradcheck(draw: Draw) -> None:
    given = arguments(draw, (2, 2, 2, 4))
    names = ("q", "k", "q_weight", "k_weight")

    def op(*values: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rope(**given | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(op, [given[name].requires_grad_() for name in names])


@pytest.mark.parametrize("changed", ["k", "q_weight", "k_weight", "cos", "sin"])
def test_a_wrong_shape_raises_with_the_argument(draw: Draw, changed: str) -> None:
    given = arguments(draw)
    good = tuple(given[changed].shape)
    given[changed] = torch.cat((given[changed], given[changed]), -1)

    with pytest.raises(ValueError) as error:
        qk_norm_rope(**given)

    for part in ("qk_norm_rope", changed, str(good), str(tuple(given[changed].shape))):
        assert part in str(error.value)


def test_an_odd_head_size_raises(draw: Draw) -> None:
    given = arguments(draw) | {"q": draw(2, 3, 2, 7), "k": draw(2, 3, 2, 7)}

    with pytest.raises(ValueError, match="head size must be even.*got 7"):
        qk_norm_rope(**given)
