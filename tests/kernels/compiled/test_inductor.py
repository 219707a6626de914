"""Inductor's kernels and bytes as the lab reports them, against counts by hand."""

import pytest
import torch
from torch import Tensor

from miro_kernels.adaln import adaln_reference
from miro_kernels.lab.inductor import generate
from miro_kernels.swiglu import swiglu_reference

BATCH, TOKENS, CHANNELS = 4, 256, 1024
ACTIVATION = BATCH * TOKENS * CHANNELS * 2  # bytes in bf16


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)


def test_swiglu_moves_the_least_bytes_in_both_directions() -> None:
    forward, backward = generate(swiglu_reference, {"packed": empty(BATCH, TOKENS, 2 * CHANNELS)})

    assert len(forward.calls) == 1 and forward.bytes == 3 * ACTIVATION
    assert backward is not None and backward.bytes == 5 * ACTIVATION


def test_the_backward_of_adaln_is_four_launches_that_read_five_activations() -> None:
    shapes = {
        "x": (BATCH, TOKENS, CHANNELS),
        "shift": (BATCH, CHANNELS),
        "scale": (BATCH, CHANNELS),
    }

    forward, backward = generate(
        adaln_reference, {name: empty(*shape) for name, shape in shapes.items()} | {"eps": 1e-6}
    )

    assert len(forward.calls) == 1
    assert forward.bytes == pytest.approx(2 * ACTIVATION, rel=0.01)
    assert backward is not None and len(backward.calls) == 4
    assert backward.bytes == pytest.approx(5 * ACTIVATION, rel=0.02)


def test_no_backward_is_generated_if_no_argument_requires_a_gradient() -> None:
    packed = torch.empty(4, 8, 32, dtype=torch.bfloat16)

    assert generate(swiglu_reference, {"packed": packed})[1] is None


def test_a_library_call_is_named() -> None:
    forward, _ = generate(lambda a, b: a @ b, {"a": torch.empty(64, 64), "b": torch.empty(64, 64)})

    assert [call.op for call in forward.calls] == ["aten::mm"]
