"""Flow matching: the path from data to noise, its velocity, the loss and the Euler step.

    x_t = (1 − t)·x + t·ε,   v* = ε − x,   t from 0 (data) to 1 (noise)

Source: flow matching (arXiv 2210.02747) in the convention of MIRO (arXiv 2510.25897, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Below this time a predicted sample is turned into a velocity as if it were this time: the
# velocity is (x_t − x) / t, and a small error in x would explode.
SMALLEST_TIME = 0.05


@dataclass(frozen=True)
class FlowConfig:
    """What the network predicts, at which times it is trained, and how errors are weighed."""

    prediction_type: Literal["velocity", "sample"] = "velocity"
    """`sample` where a patch holds as many numbers as the network is wide: noise does not fit
    through such a network, an image does (arXiv 2511.13720). The loss is on velocity in both."""
    timestep_distribution: Literal["uniform", "logit_normal"] = "uniform"
    timestep_mean: float = 0.0
    """Mean of the logit of t; positive means more training near noise."""
    timestep_std: float = 1.0
    loss_weight_clip: float = 0.0
    """Below this time the squared error of a predicted sample is no longer divided by t²."""

    def __post_init__(self) -> None:
        if not self.timestep_std > 0:
            raise ValueError(f"flow.timestep_std must be positive, got {self.timestep_std}")
        if not 0 <= self.loss_weight_clip < 1:
            raise ValueError(
                f"flow.loss_weight_clip must be in [0, 1), got {self.loss_weight_clip}"
            )


def sample_timesteps(config: FlowConfig, uniform: Tensor) -> Tensor:
    """(B,) fp32 times in [0, 1) of the law of the configuration, from uniform numbers in [0, 1)."""
    if config.timestep_distribution == "uniform":
        return uniform
    return torch.sigmoid(torch.special.ndtri(uniform) * config.timestep_std + config.timestep_mean)


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of each sample; x and noise (B, C, H, W), t (B,)."""
    t = t[:, None, None, None]
    return (1 - t) * x + t * noise


def velocity(config: FlowConfig, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity the network's output stands for; all fp32 (B, C, H, W), t (B,)."""
    if config.prediction_type == "velocity":
        return prediction
    return (x_t - prediction) / t[:, None, None, None].clamp(min=SMALLEST_TIME)


def velocity_errors(
    config: FlowConfig, prediction: Tensor, x: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """(B,) mean squared velocity error of each sample, capped in weight near the data."""
    x_t = add_noise(x, noise, t)
    error = velocity(config, prediction, x_t, t) - (noise - x)
    weight = t.clamp(min=SMALLEST_TIME) / t.clamp(min=max(config.loss_weight_clip, SMALLEST_TIME))
    return (error * weight[:, None, None, None]).square().flatten(1).mean(1)


def euler_times(steps: int) -> Tensor:
    """(steps + 1,) times from 1, pure noise, to 0, data, evenly spaced."""
    return torch.linspace(1, 0, steps + 1)


def euler_step(x_t: Tensor, v: Tensor, t: Tensor, t_next: Tensor, limit: float | None) -> Tensor:
    """One step from t to t_next < t; with `limit`, the data it points at is clamped to ±limit.

    Clamping keeps a guided sampler in the range of pixels; latents have no such range.
    """
    if limit is None:
        return x_t + (t_next - t) * v
    x = (x_t - t * v).clamp(-limit, limit)
    return x + (t_next / t) * (x_t - x)
