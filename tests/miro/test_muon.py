"""Muon: its iteration against a singular value decomposition, its update against its formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miro.muon import MuonEMA, orthogonal
from miro_kernels import AdamWEMA

Draw = Callable[..., Tensor]
RATES: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "ema_decay": 0.9}


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 24, 80), (2, 80, 24), (1, 1, 7)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_the_iteration_makes_singular_values_about_one(
    draw: Draw, shape: tuple, size: float
) -> None:
    matrices = draw(*shape, dtype=torch.float32) * size

    out = orthogonal(matrices)

    assert out.shape == shape and out.dtype == torch.float32
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    # In the singular directions of its argument it is diagonal, and near one on average.
    turned = u.mT @ out.double() @ vh.mT
    values = turned.diagonal(dim1=1, dim2=2)
    assert 0.5 < values.mean() < 1.2 and values.max() < 1.35
    off = turned - torch.diag_embed(values)
    assert off.abs().max() < 0.15


def test_a_matrix_alone_gives_what_it_gives_in_a_batch(draw: Draw) -> None:
    matrices = draw(3, 16, 24, dtype=torch.float32)

    together = orthogonal(matrices)

    torch.testing.assert_close(orthogonal(matrices[1:2])[0], together[1], rtol=0, atol=0.02)


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_its_formula(draw: Draw, dtype: torch.dtype) -> None:
    params = [nn.Parameter(draw(12, 20, dtype=dtype)) for _ in range(2)]
    optimizer = MuonEMA(
        [{"params": params, "orthogonal": True, "weight_decay": 0.1}], **RATES, momentum=0.8
    )
    masters = [param.detach().float().clone() for param in params]
    averages, momenta = [m.clone() for m in masters], [torch.zeros_like(m) for m in masters]

    for _ in range(3):
        for n, param in enumerate(params):
            param.grad = draw(12, 20, dtype=dtype)
            momenta[n] = 0.8 * momenta[n] + 0.2 * param.grad.float()
            step = orthogonal((0.2 * param.grad.float() + 0.8 * momenta[n])[None])[0]
            masters[n] = masters[n] * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 20**0.5 * step
            averages[n] = 0.9 * averages[n] + 0.1 * masters[n]
        optimizer.step()

    for param, master, average in zip(params, masters, averages, strict=True):
        torch.testing.assert_close(optimizer.master(param), master, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(optimizer.ema(param), average, rtol=1e-2, atol=1e-3)
        assert torch.equal(param, optimizer.master(param).to(dtype))


def test_what_is_not_orthogonal_is_adamws_bit_for_bit(draw: Draw) -> None:
    start, matrix = draw(5, 4, dtype=torch.float32), nn.Parameter(draw(4, 4, dtype=torch.float32))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = MuonEMA([{"params": [matrix], "orthogonal": True}, {"params": [ours]}], **RATES)
    adamw = AdamWEMA([theirs], **RATES)

    for _ in range(4):
        matrix.grad = draw(4, 4, dtype=torch.float32)
        ours.grad = theirs.grad = draw(5, 4, dtype=torch.float32)
        muon.step()
        adamw.step()

    assert torch.equal(ours, theirs) and torch.equal(muon.ema(ours), adamw.ema(theirs))


def test_only_matrices_can_be_orthogonal() -> None:
    with pytest.raises(ValueError, match=r"matrices, got a parameter \(4,\)"):
        MuonEMA([{"params": [nn.Parameter(torch.zeros(4))], "orthogonal": True}])
