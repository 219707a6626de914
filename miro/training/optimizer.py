"""Optimizer of a run: parameter groups, learning-rate and EMA schedules, gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from miro.training.muon import MuonEMA
from miro_kernels import AdamWEMA


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer with EMA weights, learning-rate schedule, gradient clipping and skipped steps."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the weight matrices of the blocks; all other parameters use AdamW. Muon needs
    whole matrices, so it cannot be sharded."""
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Of matrices only: gains, offsets and biases are not decayed."""
    warmup_images: int = 0
    """Images of linear learning-rate warmup."""
    decay_from: float = 1.0
    """Fraction of the run after which the learning rate decays linearly to zero; 1 for no decay."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are clipped."""
    skip_threshold: float = 100.0
    """Skip steps whose gradient norm is not finite or exceeds this multiple of its mean."""
    max_skipped_steps: int = 10
    """Stop the run after this many skipped steps in a row."""
    ema_halflife_images: float = 10_000.0
    """Half-life of the EMA weights, in images."""
    ema_rampup_ratio: float = 0.05
    """Upper limit of the half-life, as a fraction of the images trained on so far."""

    def __post_init__(self) -> None:
        positive = (
            "learning_rate", "eps", "max_grad_norm", "max_skipped_steps",
            "ema_halflife_images", "ema_rampup_ratio",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_images"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.decay_from <= 1:
            raise ValueError(f"optimizer.decay_from must be in [0, 1], got {self.decay_from}")
        if not self.skip_threshold > 1:
            raise ValueError(f"optimizer.skip_threshold must be above 1, got {self.skip_threshold}")


def lr_multiplier(config: OptimizerConfig, images: int, total: int) -> float:
    """Return the learning-rate factor of the step after `images` of `total` images."""
    factor = 1.0
    if config.warmup_images:
        factor = min(1.0, (images + 1) / config.warmup_images)
    start = config.decay_from * total
    if images > start:
        factor *= (total - images) / (total - start)
    return factor


def ema_decay(config: OptimizerConfig, images: int, batch: int) -> float:
    """Return a step's EMA decay: half-life in images with ramp-up (EDM2, arXiv 2312.02696)."""
    half_life = min(config.ema_halflife_images, config.ema_rampup_ratio * (images + batch))
    return 0.5 ** (batch / half_life)


def make_optimizer(
    config: OptimizerConfig, parameters: Iterable[tuple[str, nn.Parameter]]
) -> AdamWEMA:
    """Build the optimizer with groups for blocks' matrices, other matrices, and vectors."""
    block_matrices, matrices, vectors = [], [], []
    for name, param in parameters:
        # The offsets of blocks and the biases of rewards are stacked vectors.
        if param.ndim < 2 or name.endswith(("bias", "offsets")):
            vectors.append(param)
        else:
            (block_matrices if "blocks." in name else matrices).append(param)
    muon = config.name == "muon"
    return (MuonEMA if muon else AdamWEMA)(
        [
            {"params": block_matrices, "weight_decay": config.weight_decay, "use_muon": muon},
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )


class GradientClipper:
    """Clips gradients by their global norm and skips steps with spikes, without a host sync.

    A step is skipped if its norm is not finite or exceeds `skip_threshold` times its running
    mean. All ranks have the same norm, so they skip the same steps.
    """

    NAMES = ("mean", "in_row", "longest", "total")

    def __init__(self, config: OptimizerConfig, device: torch.device) -> None:
        self.config = config
        # Running mean of the norm; skipped steps in the current row, the longest row, and in total.
        self._counters = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)

    def scale(self, norm: Tensor) -> Tensor:
        """Return the factor of gradients with this norm (fp32 scalar); -1 skips the step."""
        mean, in_row, longest, total = self._counters.unbind()
        known = mean > 0
        skip = ~norm.isfinite() | (known & (norm > self.config.skip_threshold * mean))
        new_mean = torch.where(known, mean + 0.01 * (norm - mean), norm.double())
        in_row = torch.where(skip, in_row + 1, 0.0)
        self._counters = torch.stack(
            (
                torch.where(skip, mean, new_mean),
                in_row,
                torch.maximum(longest, in_row),
                total + skip,
            )
        )
        scale = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return torch.where(skip, -1.0, scale).float()

    def state_dict(self) -> dict[str, float]:
        """Return the counters by name; this waits for the device."""
        return dict(zip(self.NAMES, self._counters.tolist(), strict=True))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self._counters.copy_(
            torch.tensor([state[name] for name in self.NAMES], dtype=torch.float64)
        )
