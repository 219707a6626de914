"""Muon: orthogonal updates, equal to torch.optim.Muon's, with fp32 master and EMA weights."""

from __future__ import annotations

import pytest
import torch

from miro.training.muon import MuonEMA, orthogonalize


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 40, 16), (2, 16, 40), (1, 5, 1)])
def test_singular_values_are_moved_near_one(shape: tuple[int, int, int]):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape) * 7))
    # Five steps are too few for the smallest singular values of a square matrix.
    assert values.max() < 1.3
    assert shape[1] == shape[2] or values.min() > 0.5


def test_a_matrix_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 12)
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices), alone, rtol=0, atol=0.02)


def test_the_updates_are_those_of_torch_muon():
    torch.manual_seed(0)
    start = torch.randn(24, 12)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = MuonEMA([{"params": [ours], "use_muon": True}], lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        grad = torch.randn(24, 12)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_and_master_weights_are_fp32(dtype: torch.dtype):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(8, 4).to(dtype))
    optimizer = MuonEMA([{"params": [param], "use_muon": True}], lr=0.01, ema_decay=0.5)
    average = param.detach().float().clone()
    for _ in range(3):
        param.grad = torch.randn(8, 4).to(dtype)
        optimizer.step()
        average.lerp_(optimizer.master(param).detach(), 0.5)
    torch.testing.assert_close(optimizer.ema(param), average)
    assert optimizer.master(param).dtype == optimizer.ema(param).dtype == torch.float32
    assert torch.equal(param, optimizer.master(param).to(dtype))
    assert "exp_avg_sq" not in optimizer.state[param]


def test_other_groups_are_adamw():
    torch.manual_seed(0)
    start, grad = torch.randn(6), torch.randn(6)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = MuonEMA([{"params": [ours]}], lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))
    ours.grad, theirs.grad = grad.clone(), grad.clone()
    mine.step()
    reference.step()
    torch.testing.assert_close(ours, theirs)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"Muon takes matrices, got a parameter \(3,\)"):
        MuonEMA([{"params": [torch.nn.Parameter(torch.zeros(3))], "use_muon": True}])
