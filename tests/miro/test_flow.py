"""The path, its velocity, the loss and the Euler step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from miro.flow import (
    MIN_TIMESTEP,
    FlowConfig,
    add_noise,
    euler_step,
    euler_timesteps,
    sample_timesteps,
    velocity,
    velocity_errors,
)

Draw = Callable[..., Tensor]
VELOCITY, SAMPLE = FlowConfig(prediction_type="velocity"), FlowConfig(prediction_type="sample")


def uniform(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def exact_prediction(config: FlowConfig, x: Tensor, noise: Tensor) -> Tensor:
    return x if config.prediction_type == "sample" else noise - x


def test_the_path_goes_from_data_to_noise(draw: Draw) -> None:
    x, noise = draw(3, 2, 4, 4), draw(3, 2, 4, 4)

    x_t = add_noise(x, noise, torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64))

    assert torch.equal(x_t[0], x[0]) and torch.equal(x_t[1], noise[1])
    torch.testing.assert_close(x_t[2], 0.75 * x[2] + 0.25 * noise[2])


@pytest.mark.parametrize("config", [VELOCITY, SAMPLE], ids=lambda c: c.prediction_type)
def test_an_exact_prediction_gives_the_velocity_of_the_path_and_no_loss(
    draw: Draw, config: FlowConfig
) -> None:
    x, noise = draw(5, 2, 4, 4), draw(5, 2, 4, 4)
    t = torch.tensor([MIN_TIMESTEP, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)

    v = velocity(config, exact_prediction(config, x, noise), add_noise(x, noise, t), t)

    torch.testing.assert_close(v, noise - x, rtol=1e-9, atol=1e-9)
    errors = velocity_errors(config, exact_prediction(config, x, noise), x, noise, t)
    assert errors.shape == (5,) and errors.max() < 1e-15


def test_the_velocity_of_a_predicted_sample_is_bounded_near_the_data(draw: Draw) -> None:
    x, noise = draw(2, 1, 4, 4), draw(2, 1, 4, 4)
    t = torch.tensor([0.0, 1e-6], dtype=torch.float64)

    v = velocity(SAMPLE, x + 0.01, add_noise(x, noise, t), t)

    assert v.abs().max() < 0.011 / MIN_TIMESTEP


@pytest.mark.parametrize("config", [VELOCITY, SAMPLE], ids=lambda c: c.prediction_type)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("clip_range", [None, 4.0])
def test_euler_with_the_exact_velocity_ends_at_the_data(
    draw: Draw, config: FlowConfig, steps: int, clip_range: float | None
) -> None:
    x, noise = draw(2, 3, 4, 4).clamp(-2, 2), draw(2, 3, 4, 4)
    times = euler_timesteps(steps).double()

    x_t = noise
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = velocity(config, exact_prediction(config, x, noise), x_t, t.expand(2))
        x_t = euler_step(x_t, v, t, t_next, clip_range)
        torch.testing.assert_close(x_t, add_noise(x, noise, t_next.expand(2)))

    torch.testing.assert_close(x_t, x, rtol=1e-6, atol=1e-6)


def test_clip_range_clamps_the_implied_clean_sample(draw: Draw) -> None:
    x_t, v = draw(2, 3, 4, 4), draw(2, 3, 4, 4) * 9
    half, zero = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)

    end = euler_step(x_t, v, half, zero, 1.0)

    assert torch.equal(end, (x_t - 0.5 * v).clamp(-1, 1))
    assert end.abs().max() == 1 and euler_step(x_t, v, half, zero, None).abs().max() > 1


def test_euler_timesteps_are_evenly_spaced_from_noise_to_data() -> None:
    torch.testing.assert_close(euler_timesteps(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_the_loss_is_the_mean_squared_velocity_error_of_each_sample(draw: Draw) -> None:
    x, noise, wrong = draw(2, 3, 4, 4), draw(2, 3, 4, 4), draw(2, 3, 4, 4)
    t = torch.tensor([0.1, 0.6], dtype=torch.float64)

    errors = velocity_errors(VELOCITY, noise - x + wrong, x, noise, t)
    torch.testing.assert_close(errors, wrong.square().mean((1, 2, 3)))

    errors = velocity_errors(SAMPLE, x + wrong, x, noise, t)
    torch.testing.assert_close(errors, wrong.square().mean((1, 2, 3)) / t**2)


@pytest.mark.parametrize("t", [0.01, 0.1, 0.3, 0.6])
def test_loss_weight_is_constant_below_the_clip(draw: Draw, t: float) -> None:
    x, noise, wrong = draw(1, 3, 4, 4), draw(1, 3, 4, 4), draw(1, 3, 4, 4)
    config, times = (
        FlowConfig(prediction_type="sample", loss_weight_clip=0.3),
        torch.tensor([t]).double(),
    )
    # The prediction whose velocity is exact, and one that is off by `wrong`.
    exact = add_noise(x, noise, times) - max(t, MIN_TIMESTEP) * (noise - x)

    errors = velocity_errors(config, exact + wrong, x, noise, times)

    expected = (wrong / max(t, 0.3)).square().mean()
    torch.testing.assert_close(errors[0], expected, rtol=1e-6, atol=0)


def test_uniform_timesteps_have_the_mean_and_deviation_of_their_distribution() -> None:
    t = sample_timesteps(FlowConfig(), uniform(20_000, 1))

    assert t.dtype == torch.float32 and 0 <= t.min() and t.max() < 1
    assert abs(t.mean() - 0.5) < 0.01 and abs(t.std() - 12**-0.5) < 0.01


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 1.0), (-0.5, 0.3)])
def test_logits_of_logit_normal_timesteps_are_normal(mean: float, std: float) -> None:
    config = FlowConfig(timestep_distribution="logit_normal", timestep_mean=mean, timestep_std=std)

    logits = sample_timesteps(config, uniform(20_000, 1)).double().logit()

    assert abs(logits.mean() - mean) < 0.03 * std and abs(logits.std() - std) < 0.02 * std


def test_timesteps_are_a_function_of_the_uniform_numbers() -> None:
    for config in (FlowConfig(), FlowConfig(timestep_distribution="logit_normal")):
        first, again, other = (sample_timesteps(config, uniform(8, seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"timestep_std": 0.0}, "flow.timestep_std.*got 0.0"),
        ({"timestep_std": float("nan")}, "flow.timestep_std.*got nan"),
        ({"loss_weight_clip": 1.0}, "flow.loss_weight_clip.*got 1.0"),
        ({"loss_weight_clip": -0.1}, "flow.loss_weight_clip.*got -0.1"),
    ],
)
def test_invalid_values_are_named_in_the_error(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FlowConfig(**bad)
