"""Norms, RoPE and SwiGLU at shapes and dtypes other than the preset's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from miro_kernels import qk_norm_rope, reward_adaln, swiglu
from miro_kernels.lab.resources import capture

BATCH, TOKENS = 4, 64


def norm(make: Callable[..., Tensor], channels: int) -> Any:
    table = make(2, 8, 2, 3, channels)[:, :, 1]
    bins = torch.zeros(BATCH, 2, dtype=torch.int64)
    base = make(BATCH, 2, 3, channels)[:, 1]
    x, branch = make(BATCH, TOKENS, channels), make(BATCH, TOKENS, channels)
    return reward_adaln(
        x, base, make(3, channels), table, bins, bins.bool(), branch=branch
    )  # fmt: skip


def rotation(make: Callable[..., Tensor], channels: int) -> Any:
    size = {200: 32, 1152: 96, 2048: 128}[channels]
    q, k, _ = make(BATCH, TOKENS, 3, channels // size, size).unbind(2)
    angles = torch.empty(TOKENS, size // 2)
    return qk_norm_rope(q, k, make(size), make(size), angles, angles)


def activation(make: Callable[..., Tensor], channels: int) -> Any:
    return swiglu(make(BATCH, TOKENS, 2 * channels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [200, 1152, 2048])
@pytest.mark.parametrize("op", [norm, rotation, activation], ids=lambda op: op.__name__)
def test_aligned_shapes_have_wide_accesses_and_no_spills(
    op: Callable[..., Any], channels: int, dtype: torch.dtype
) -> None:
    def make(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    with capture("sm_90") as kernels:
        result = op(make, channels)
        outputs = result if isinstance(result, tuple) else (result,)
        torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])

    assert len(kernels) >= 2
    for kernel in kernels:
        assert kernel.spills == kernel.narrow == kernel.atomics == 0, kernel
        assert kernel.wide > 0 and kernel.fits, kernel
