"""AdamWEMA against torch.optim.AdamW and an EMA in plain torch."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from miro_kernels import AdamWEMA

Draw = Callable[..., Tensor]
SHAPES = [(7, 5), (5,), (1,), (0, 3), (2, 3, 4)]
RATES = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-7}


def parameters(draw: Draw, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(draw(*shape, dtype=dtype)) for shape in SHAPES]


def groups(params: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skip", [False, True], ids=["all have gradients", "some have none"])
def test_twenty_steps_match_adamw_and_an_ema(draw: Draw, dtype: torch.dtype, skip: bool) -> None:
    params = parameters(draw, dtype)
    expected = [nn.Parameter(param.detach().float().clone()) for param in params]
    emas = [param.detach().clone() for param in expected]
    optimizer = AdamWEMA(groups(params), **RATES, ema_decay=0.9)
    oracle = torch.optim.AdamW(groups(expected), **RATES)

    for step in range(20):
        for number, (param, twin) in enumerate(zip(params, expected, strict=True)):
            absent = skip and (step + number) % 3 == 0
            param.grad = None if absent else draw(*param.shape, dtype=dtype)
            twin.grad = None if param.grad is None else param.grad.float()
        optimizer.step()
        oracle.step()
        for ema, twin in zip(emas, expected, strict=True):
            if twin.grad is not None:
                ema.mul_(0.9).add_(twin.detach(), alpha=0.1)

    for param, twin, ema in zip(params, expected, emas, strict=True):
        master = optimizer.master(param)
        assert master.dtype == optimizer.ema(param).dtype == torch.float32
        torch.testing.assert_close(master, twin, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.ema(param), ema, rtol=1e-5, atol=1e-6)
        assert torch.equal(param, master.to(dtype))


def test_updates_below_the_precision_of_bf16_add_up_in_the_master() -> None:
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamWEMA([param], lr=1e-4)

    for _ in range(100):
        param.grad = torch.ones_like(param)
        optimizer.step()

    # In bf16 a step of 1e-4 from 1 would be lost: the next value below is 0.996.
    torch.testing.assert_close(optimizer.master(param), torch.full((4,), 0.99), rtol=0, atol=1e-5)
    assert torch.equal(param, optimizer.master(param).bfloat16())


def test_a_parameter_without_gradient_is_not_updated(draw: Draw) -> None:
    still, moving = nn.Parameter(draw(3).float()), nn.Parameter(draw(3).float())
    optimizer = AdamWEMA([still, moving], lr=0.1, weight_decay=0.5)
    before = still.detach().clone()
    moving.grad = torch.ones(3)

    optimizer.step()

    assert torch.equal(still, before) and torch.equal(optimizer.ema(still), before)


def test_ema_decay_may_change_and_0_disables_the_ema(draw: Draw) -> None:
    param = nn.Parameter(draw(4).float())
    optimizer = AdamWEMA([param], lr=0.1, ema_decay=0.99)
    for decay in (0.99, 0.0):
        optimizer.param_groups[0]["ema_decay"] = decay
        param.grad = draw(4).float()
        optimizer.step()
        assert torch.equal(optimizer.ema(param), param.detach()) == (decay == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_continues_bit_for_bit(draw: Draw, dtype: torch.dtype) -> None:
    params = parameters(draw, dtype)
    optimizer = AdamWEMA(groups(params), **RATES)
    gradients = [[draw(*p.shape, dtype=dtype) for p in params] for _ in range(6)]

    def run(optimizer: AdamWEMA, params: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
        for step in steps:
            for param, gradient in zip(params, step, strict=True):
                param.grad = gradient
            optimizer.step()

    run(optimizer, params, gradients[:3])
    copies = deepcopy(params)
    restored = AdamWEMA(groups(copies), **RATES)
    restored.load_state_dict(deepcopy(optimizer.state_dict()))
    run(optimizer, params, gradients[3:])
    run(restored, copies, gradients[3:])

    for param, copy in zip(params, copies, strict=True):
        assert torch.equal(param, copy)
        assert torch.equal(optimizer.master(param), restored.master(copy))
        assert torch.equal(optimizer.ema(param), restored.ema(copy))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\].*1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\].*-0.1"),
        ({"ema_decay": 1.0}, "ema_decay.*1.0"),
    ],
)
def test_invalid_hyperparameters_raise(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamWEMA([nn.Parameter(torch.zeros(2))], **bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_scale_scales_gradients(draw: Draw, dtype: torch.dtype) -> None:
    plain, scaled = parameters(draw, dtype), []
    scaled = [nn.Parameter(param.detach().clone()) for param in plain]
    grads = [draw(*param.shape, dtype=dtype) for param in plain]
    optimizers = AdamWEMA(groups(plain), **RATES), AdamWEMA(groups(scaled), **RATES)
    optimizers[1].grad_scale = torch.tensor(0.25)

    for _ in range(3):
        for params, factor in (plain, 0.25), (scaled, 1.0):
            for param, grad in zip(params, grads, strict=True):
                param.grad = factor * grad
        for optimizer in optimizers:
            optimizer.step()

    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(optimizers[1].master(b), optimizers[0].master(a))
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [-1.0, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_negative_or_nan_grad_scale_skips_the_step(
    draw: Draw, dtype: torch.dtype, scale: float
) -> None:
    params = parameters(draw, dtype)
    optimizer = AdamWEMA(groups(params), **RATES)
    for param in params:
        param.grad = draw(*param.shape, dtype=dtype)
    optimizer.step()
    before = deepcopy([(p.detach(), optimizer.state[p]) for p in params])
    for param in params:
        param.grad = torch.full_like(param, torch.nan)
    optimizer.grad_scale = torch.tensor(scale)

    optimizer.step()

    for param, (weights, state) in zip(params, before, strict=True):
        assert torch.equal(param, weights)
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert torch.equal(optimizer.state[param][key], value)
