"""Attention's compiled code beyond the preset: every head size, short images, other dtypes."""

from itertools import accumulate

import pytest
import torch

from miro_kernels import attention
from miro_kernels.lab.resources import MACHINES, capture

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}


def launch(size: int, *, tokens: int = 256, longest: int = 40, dtype: torch.dtype) -> None:
    """Both directions on views of packed projections, two samples of two heads."""
    lengths = [longest, 1]
    image = torch.zeros(2, tokens, 3, 2, size, dtype=dtype).unbind(2)
    text = torch.zeros(sum(lengths), 2, 2, size, dtype=dtype).unbind(1)
    q, k, v, text_k, text_v = (z.requires_grad_() for z in image + text)
    offsets = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    out = attention(q, k, v, text_k, text_v, offsets, longest)
    out.backward(torch.empty_like(out))


@pytest.mark.parametrize("target", MATRIX)
@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_every_head_size(size: int, target: str) -> None:
    with capture(target) as kernels:
        launch(size, dtype=torch.bfloat16)

    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.fits and kernel.occupancy > 0 and kernel.atomics == 0, kernel
        assert kernel.matrix and all(n.startswith(MATRIX[target]) for n in kernel.matrix), kernel
        if MACHINES[target].vendor == "cuda":
            assert kernel.spills == 0 and kernel.narrow == 0 and kernel.wide > 0, kernel


@pytest.mark.parametrize("tokens", [64, 250])
def test_short_and_odd_images_do_not_spill(tokens: int) -> None:
    with capture("sm_90") as kernels:
        launch(64, tokens=tokens, dtype=torch.float16)

    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.fits and kernel.spills == kernel.atomics == 0, kernel
        assert kernel.matrix.keys() == {"HGMMA"}, kernel


def test_text_lengths_do_not_recompile() -> None:
    """A batch in the middle of a run must not wait for the compiler."""
    with capture("sm_90") as kernels:  # lists each kernel once
        for longest in (1, 40, 64 * 16):
            launch(64, longest=longest, dtype=torch.bfloat16)

    assert len(kernels) == 3
