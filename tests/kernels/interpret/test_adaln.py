"""The kernels of adaLN, alone and gated, against the reference: outputs and every gradient."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from miro_kernels import adaln, gated_residual_adaln, use_backend
from miro_kernels.adaln import adaln_reference, gated_residual_adaln_reference
from miro_kernels.adaln.op import adaln_op, gated_op
from miro_kernels.lab import testing

Draw = Callable[..., Tensor]
# Tiny; odd; a prime number of tokens and more than one chunk; wide and not a power of two.
SHAPES = [(1, 1, 8), (2, 5, 24), (2, 67, 200), (1, 3, 1152)]
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "adaln": (adaln, adaln_reference),
    "gated": (gated_residual_adaln, gated_residual_adaln_reference),
}


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def arguments(draw: Draw, device: str, op: str, shape: tuple, dtype: torch.dtype) -> dict[str, Any]:
    batch, _, channels = shape
    tensors: dict[str, Any] = {"x": draw(*shape)}
    if op == "gated":
        tensors |= {"branch": draw(*shape), "gate": draw(batch, channels)}
    tensors |= {"shift": draw(batch, channels), "scale": draw(batch, channels)}
    tensors = {name: z.to(device, dtype).requires_grad_() for name, z in tensors.items()}
    return tensors | {"eps": 1e-5}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_match_the_reference(draw: Draw, device: str, op: str, shape: tuple) -> None:
    given = arguments(draw, device, op, shape, torch.float32)

    testing.assert_close(*OPS[op], given, gradient=testing.transposed_gradient)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matches_the_reference(
    draw: Draw, device: str, op: str, dtype: torch.dtype
) -> None:
    given = arguments(draw, device, op, (2, 7, 200), dtype)
    given["shift"] = given["shift"].detach().float().requires_grad_()

    testing.assert_close(*OPS[op], given)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 3e4), (torch.bfloat16, 1e15)])
def test_large_values_match_the_reference(
    draw: Draw, device: str, op: str, dtype: torch.dtype, size: float
) -> None:
    given = arguments(draw, device, op, (2, 3, 40), dtype)
    given["x"] = (given["x"].detach() * size).requires_grad_()

    testing.assert_close(*OPS[op], given)


def test_strided_arguments_match_the_reference(draw: Draw, device: str) -> None:
    given = arguments(draw, device, "gated", (2, 5, 24), torch.float32)
    modulation = draw(2, 3, 24).to(device, torch.float32)
    for number, name in enumerate(("gate", "shift", "scale")):
        given[name] = modulation[:, number].requires_grad_()
    given["x"] = draw(24, 5, 2).to(device, torch.float32).transpose(0, 2).requires_grad_()

    testing.assert_close(*OPS["gated"], given)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_empty_inputs_give_empty_or_zero_results(
    draw: Draw, device: str, op: str, shape: tuple
) -> None:
    found = testing.evaluate(OPS[op][0], arguments(draw, device, op, shape, torch.float32))

    assert all(not tensor.any() for tensor in found.values())
    assert found["d x"].shape == shape and found["d shift"].shape == (shape[0], 8)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_are_bitwise_equal(draw: Draw, device: str, op: str) -> None:
    given = arguments(draw, device, op, (2, 67, 64), torch.bfloat16)

    testing.assert_repeats(OPS[op][0], given)


@pytest.mark.parametrize("op", OPS)
def test_a_nan_stays_in_its_sample(draw: Draw, device: str, op: str) -> None:
    given = arguments(draw, device, op, (3, 6, 16), torch.float32)
    clean = testing.evaluate(OPS[op][0], given)
    given["x"].data[1, 2, 3] = torch.nan

    found = testing.evaluate(OPS[op][0], given)

    assert found["d x"][1].isnan().any() and found["d scale"][1].isnan().any()
    for name, tensor in found.items():
        assert torch.equal(tensor[[0, 2]], clean[name][[0, 2]]), name


def test_gradients_when_only_one_output_is_used(draw: Draw, device: str) -> None:
    given = arguments(draw, device, "gated", (2, 5, 24), torch.float32)
    for number in (0, 1):
        op, reference = (
            lambda f=f, **given: f(**given)[number]  # noqa: B023, called in the same iteration
            for f in OPS["gated"]
        )
        testing.assert_close(op, reference, given)


def test_the_registered_ops_pass_opcheck(draw: Draw, device: str) -> None:
    x, *modulation, eps = arguments(draw, device, "adaln", (2, 3, 8), torch.float32).values()
    torch.library.opcheck(adaln_op, (x, modulation, [], eps))
    given = arguments(draw, device, "gated", (2, 3, 8), torch.float32)
    x, branch, *modulation, eps = given.values()
    torch.library.opcheck(gated_op, (x, branch, modulation, [], eps))


def test_unsupported_arguments_raise(draw: Draw, device: str) -> None:
    given = arguments(draw, device, "adaln", (1, 2, 8), torch.float64)
    with pytest.raises(ValueError, match="adaln: the backend triton.*fp32, bf16 and fp16.*float64"):
        adaln(**given)
    wide = arguments(draw, device, "adaln", (1, 1, 8193), torch.float32)
    with pytest.raises(ValueError, match="adaln: the backend triton.*8192 channels, not 8193"):
        adaln(**wide)
