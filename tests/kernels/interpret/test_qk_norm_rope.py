"""The kernels of QK norm and RoPE against the reference."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from miro_kernels import qk_norm_rope, use_backend
from miro_kernels.lab import testing
from miro_kernels.qk_norm_rope import qk_norm_rope_op, qk_norm_rope_reference

Draw = Callable[..., Tensor]
# (B, N, heads, head size)
SHAPES = [(1, 1, 1, 2), (2, 5, 3, 8), (3, 7, 2, 96), (2, 4, 16, 64), (2, 1, 2, 6), (5, 3, 1, 128)]


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def arguments(
    draw: Draw, device: str, shape: tuple, dtype: torch.dtype, layout: str = "packed"
) -> dict[str, Any]:
    batch, tokens, heads, size = shape
    shapes = {
        "packed": (batch, tokens, 3, heads, size),
        "heads first": (batch, heads, 3, tokens, size),
        "channels first": (batch, size, 3, heads, tokens),
    }
    packed = draw(*shapes[layout]).to(device, dtype)
    q, k, _ = packed.unbind(2)
    if layout == "heads first":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    elif layout == "channels first":
        q, k = q.transpose(1, 3), k.transpose(1, 3)
    tensors = {"q": q, "k": k, "q_weight": draw(size), "k_weight": draw(size)}
    tensors = {name: z.to(device, dtype).requires_grad_() for name, z in tensors.items()}
    angles = draw(tokens, size // 2).to(device, torch.float32) * 3
    return tensors | {"cos": angles.cos(), "sin": angles.sin()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_match_the_reference(draw: Draw, device: str, shape: tuple) -> None:
    given = arguments(draw, device, shape, torch.float32)

    testing.assert_close(
        qk_norm_rope, qk_norm_rope_reference, given, gradient=testing.transposed_gradient
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matches_the_reference(draw: Draw, device: str, dtype: torch.dtype) -> None:
    given = arguments(draw, device, (3, 5, 4, 32), dtype)

    testing.assert_close(qk_norm_rope, qk_norm_rope_reference, given)


@pytest.mark.parametrize("layout", ["heads first", "channels first"])
def test_strided_arguments_match_the_reference(draw: Draw, device: str, layout: str) -> None:
    given = arguments(draw, device, (2, 3, 4, 8), torch.float32, layout)

    testing.assert_close(qk_norm_rope, qk_norm_rope_reference, given)


def test_slices_of_a_packed_projection_are_not_copied(draw: Draw, device: str, count: Any) -> None:
    given = arguments(draw, device, (2, 4, 2, 16), torch.float32)
    inputs = 2 * given["q"].numel() * 4  # bytes of q and k; the outputs have as many

    with count() as traffic, torch.no_grad():
        qk_norm_rope(**given)

    small = sum(given[name].numel() * 4 for name in ("q_weight", "k_weight", "cos", "sin"))
    assert traffic.distinct == 2 * inputs + small


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8)], ids=str)
def test_empty_inputs_give_empty_or_zero_results(draw: Draw, device: str, shape: tuple) -> None:
    found = testing.evaluate(qk_norm_rope, arguments(draw, device, shape, torch.float32))

    assert all(not tensor.any() for tensor in found.values())
    assert found["d q"].shape == shape and found["d k_weight"].shape == (8,)


def test_two_runs_are_bitwise_equal(draw: Draw, device: str) -> None:
    given = arguments(draw, device, (5, 9, 6, 16), torch.bfloat16)

    testing.assert_repeats(qk_norm_rope, given)


def test_a_nan_stays_in_its_head(draw: Draw, device: str) -> None:
    given = arguments(draw, device, (2, 3, 2, 8), torch.float32)
    given["q"].data[1, 2, 1, 0] = torch.nan

    q, k = qk_norm_rope(**given)

    assert q[1, 2, 1].isnan().all()
    assert q.isnan().sum() == 8 and not k.isnan().any()


def test_angles_that_require_grad_raise(draw: Draw, device: str) -> None:
    given = arguments(draw, device, (1, 3, 2, 8), torch.float32)
    given["cos"].requires_grad_()

    with pytest.raises(ValueError, match="qk_norm_rope: the backend triton.*cos and sin"):
        qk_norm_rope(**given)


def test_the_registered_op_passes_opcheck(draw: Draw, device: str) -> None:
    given = arguments(draw, device, (2, 3, 2, 8), torch.float32)

    torch.library.opcheck(qk_norm_rope_op, tuple(given.values()))
