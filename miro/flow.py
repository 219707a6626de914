"""Flow matching: the path from data to noise, its velocity, the loss and the Euler step.

    x_t = (1 − t)·x + t·ε,   v* = ε − x,   t from 0 (data) to 1 (noise)

    L = E ‖v_θ(x_t, t, c, s) − v*‖²

Source: flow matching (arXiv 2210.02747) in the convention of MIRO (arXiv 2510.25897, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Lower bound of t in v = (x_t − x̂) / t, where a small error of x̂ would explode.
MIN_TIMESTEP = 0.05


@dataclass(frozen=True)
class FlowConfig:
    """Prediction type, distribution of training timesteps and weighting of the loss."""

    prediction_type: Literal["velocity", "sample"] = "velocity"
    """What the network outputs: v, or the clean x. The loss is on v in both. `sample` suits patches
    with as many values as the network has channels: noise does not fit through such a network, an
    image does (arXiv 2511.13720)."""
    timestep_distribution: Literal["uniform", "logit_normal"] = "uniform"
    timestep_mean: float = 0.0
    """Mean of logit(t); positive means more training near noise."""
    timestep_std: float = 1.0
    """Standard deviation of logit(t)."""
    loss_weight_clip: float = 0.0
    """With `sample`: the weight 1/t² of the squared error of x is constant for t below this."""

    def __post_init__(self) -> None:
        if not self.timestep_std > 0:
            raise ValueError(f"flow.timestep_std must be positive, got {self.timestep_std}")
        if not 0 <= self.loss_weight_clip < 1:
            raise ValueError(
                f"flow.loss_weight_clip must be in [0, 1), got {self.loss_weight_clip}"
            )


def sample_timesteps(config: FlowConfig, uniform: Tensor) -> Tensor:
    """(B,) fp32 timesteps in [0, 1): the inverse CDF of the distribution at `uniform` (B,)."""
    if config.timestep_distribution == "uniform":
        return uniform
    return torch.sigmoid(torch.special.ndtri(uniform) * config.timestep_std + config.timestep_mean)


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t)·x + t·ε; x and noise (B, C, H, W), t (B,)."""
    t = t[:, None, None, None]
    return (1 - t) * x + t * noise


def velocity(config: FlowConfig, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Velocity v from the network's output: itself, or (x_t − x̂) / t; fp32 (B, C, H, W)."""
    if config.prediction_type == "velocity":
        return prediction
    return (x_t - prediction) / t[:, None, None, None].clamp(min=MIN_TIMESTEP)


def velocity_errors(
    config: FlowConfig, prediction: Tensor, x: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """(B,) losses: each sample's mean squared error of v, its weight clipped near the data."""
    x_t = add_noise(x, noise, t)
    error = velocity(config, prediction, x_t, t) - (noise - x)
    weight = t.clamp(min=MIN_TIMESTEP) / t.clamp(min=max(config.loss_weight_clip, MIN_TIMESTEP))
    return (error * weight[:, None, None, None]).square().flatten(1).mean(1)


def euler_timesteps(steps: int) -> Tensor:
    """(steps + 1,) timesteps from 1 (noise) to 0 (data), evenly spaced."""
    return torch.linspace(1, 0, steps + 1)


def euler_step(
    x_t: Tensor, v: Tensor, t: Tensor, t_next: Tensor, clip_range: float | None
) -> Tensor:
    """Euler step to t_next < t: x_t + (t_next − t)·v.

    With `clip_range` the clean sample that v implies, x̂ = x_t − t·v, is clamped to ±clip_range
    first: guidance drives pixels out of range. Latents have no range.
    """
    if clip_range is None:
        return x_t + (t_next - t) * v
    x = (x_t - t * v).clamp(-clip_range, clip_range)
    return x + (t_next / t) * (x_t - x)
