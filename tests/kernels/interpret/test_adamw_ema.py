"""The optimizer's kernel against the reference, through the optimizer itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miro.training.muon import MuonEMA
from miro_kernels import AdamWEMA, use_backend

Draw = Callable[..., Tensor]
# Small, empty, unaligned, and larger than one chunk.
SHAPES = [(7, 5), (1,), (0, 3), (16,), (2, 4112), (33,)]
RATES: dict[str, Any] = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-7, "ema_decay": 0.9}


def state_of(optimizer: AdamWEMA, params: list[nn.Parameter]) -> list[Tensor]:
    """Every tensor that a step changes."""
    tensors = []
    for param in params:
        state = [v for v in optimizer.state[param].values() if isinstance(v, Tensor)]
        tensors += [param.detach(), optimizer.master(param).detach(), *state]
    return tensors


def steps(
    draw: Draw, backend: str, device: str, dtype: torch.dtype, optimizer: type[AdamWEMA] = AdamWEMA
) -> list[Tensor]:
    """The state after four steps; every third gradient is missing."""
    params = [nn.Parameter(draw(*shape).to(device, dtype)) for shape in SHAPES]
    matrices = [param for param in params if param.ndim == 2 and param.numel()]
    groups = [
        {"params": matrices, "weight_decay": 0.3, "use_muon": optimizer is MuonEMA},
        {"params": [param for param in params if not any(param is m for m in matrices)]},
    ]
    instance = optimizer(groups, **RATES)
    with use_backend(backend):
        for step in range(4):
            for number, param in enumerate(params):
                absent = (step + number) % 3 == 0
                param.grad = None if absent else draw(*param.shape).to(device, dtype)
            instance.step()
    return state_of(instance, params)


@pytest.fixture
def restart(draw: Draw) -> Callable[[], Draw]:
    """Return a `draw` with a freshly seeded generator at each call."""

    def start() -> Draw:
        generator = torch.Generator().manual_seed(3)
        return lambda *shape: torch.randn(shape, generator=generator)

    return start


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        (AdamWEMA, torch.float32),
        (AdamWEMA, torch.bfloat16),
        (AdamWEMA, torch.float16),
        (MuonEMA, torch.bfloat16),
    ],
)
def test_steps_match_the_reference(
    restart: Callable[[], Draw], device: str, optimizer: type[AdamWEMA], dtype: torch.dtype
) -> None:
    found = steps(restart(), "triton", device, dtype, optimizer)
    expected = steps(restart(), "torch", device, dtype, optimizer)

    for tensor, reference in zip(found, expected, strict=True):
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(tensor, reference, rtol=2e-6, atol=1e-6)
        else:
            # Masters that differ in the last bit may round to adjacent values.
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(tensor, reference, rtol=unit, atol=1e-6)


@pytest.mark.parametrize("scale", [0.25, 0.0, -1.0, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_scale_scales_gradients_or_skips_the_step(
    draw: Draw, device: str, dtype: torch.dtype, scale: float
) -> None:
    weights = [draw(*shape).to(device, dtype) for shape in SHAPES]
    grads = [draw(*shape).to(device, dtype) for shape in SHAPES]
    found = []
    for backend in ("triton", "torch"):
        params = [nn.Parameter(tensor.clone()) for tensor in weights]
        optimizer = AdamWEMA(params, **RATES, weight_decay=0.3)
        optimizer.grad_scale = torch.tensor(scale, device=device)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad if scale >= 0 else torch.full_like(grad, torch.nan)
        with use_backend(backend):
            optimizer.step()
        found.append(state_of(optimizer, params))
        if not scale >= 0:
            assert all(torch.equal(a, b) for a, b in zip(params, weights, strict=True))

    for ours, reference in zip(*found, strict=True):
        unit = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, reference, rtol=max(2e-6, unit), atol=1e-6)


def test_two_runs_are_bitwise_equal(restart: Callable[[], Draw], device: str) -> None:
    first = steps(restart(), "triton", device, torch.bfloat16)
    second = steps(restart(), "triton", device, torch.bfloat16)

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_launch_loads_and_stores_every_tensor_of_a_group_once(
    draw: Draw, count: Any, device: str
) -> None:
    params = [nn.Parameter(draw(size).to(device, torch.bfloat16)) for size in (64, 4096, 9216)]
    optimizer = AdamWEMA(params, **RATES)
    for param in params:
        param.grad = torch.ones_like(param)
        optimizer.master(param)

    with use_backend("triton"), count() as traffic:
        optimizer.step()

    (launch,) = traffic.launches
    numel = sum(param.numel() for param in params)
    table = traffic.distinct - 36 * numel
    assert 0 < table < 1024 and launch.grid[0] == 4


def test_with_ema_decay_0_the_ema_is_the_weights(draw: Draw, device: str) -> None:
    param = nn.Parameter(draw(48).to(device, torch.float32))
    optimizer = AdamWEMA([param], lr=0.1, ema_decay=0.0)
    param.grad = torch.ones_like(param)

    with use_backend("triton"):
        optimizer.step()

    assert torch.equal(optimizer.ema(param), param.detach())


def test_a_parameter_that_is_not_contiguous_raises(draw: Draw, device: str) -> None:
    param = nn.Parameter(draw(4, 6).to(device, torch.float32).T)
    param.grad = torch.ones_like(param)

    with use_backend("triton"), pytest.raises(ValueError, match="AdamWEMA.*not contiguous"):
        AdamWEMA([param]).step()
