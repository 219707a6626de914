"""The optimizer of a run: what updates which parameter, its rates, and which steps are skipped."""

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
    """The optimizer with the average of the weights inside, its learning-rate law, and clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """What updates the matrices of the blocks; everything else is AdamW's. Muon needs whole
    matrices, so it cannot be sharded."""
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Of matrices; gains, offsets and biases are never decayed."""
    warmup_images: int = 0
    """The rate rises linearly over these images."""
    decay_from: float = 1.0
    """Share of the run after which the rate falls linearly to zero; 1 keeps it constant."""
    clip: float = 1.0
    """Largest norm of all gradients together."""
    skip_above: float = 100.0
    """A step whose gradients' norm is above this many times its running mean is skipped, as is one
    whose norm is not a number."""
    skips: int = 10
    """After as many skipped steps in a row the run stops."""
    ema_images: float = 10_000.0
    """Images after which a weight's share in the average has halved."""
    ema_ramp: float = 0.05
    """The half-life is at most this share of the images seen, so that a young average is young."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip", "ema_images", "ema_ramp", "skips"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_images"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.decay_from <= 1:
            raise ValueError(f"optimizer.decay_from is a share of 1, got {self.decay_from}")
        if not self.skip_above > 1:
            raise ValueError(f"optimizer.skip_above must be above 1, got {self.skip_above}")


def lr_multiplier(config: OptimizerConfig, images: int, total: int) -> float:
    """What the learning rate is multiplied by for the step that begins after `images` images."""
    factor = 1.0
    if config.warmup_images:
        factor = min(1.0, (images + 1) / config.warmup_images)
    start = config.decay_from * total
    if images > start:
        factor *= (total - images) / (total - start)
    return factor


def ema_decay(config: OptimizerConfig, images: int, batch: int) -> float:
    """How much of the old average a step keeps: half-life in images, ramped (EDM2, 2312.02696)."""
    half_life = min(config.ema_images, config.ema_ramp * (images + batch))
    return 0.5 ** (batch / half_life)


def make_optimizer(
    config: OptimizerConfig, parameters: Iterable[tuple[str, nn.Parameter]]
) -> AdamWEMA:
    """The optimizer over named parameters, grouped by what updates them and whether they decay."""
    of_blocks, matrices, vectors = [], [], []
    for name, param in parameters:
        # Offsets of blocks and biases of rewards are stacks of vectors.
        if param.ndim < 2 or name.endswith(("bias", "offsets")):
            vectors.append(param)
        else:
            (of_blocks if "blocks." in name else matrices).append(param)
    muon = config.name == "muon"
    return (MuonEMA if muon else AdamWEMA)(
        [
            {"params": of_blocks, "weight_decay": config.weight_decay, "orthogonal": muon},
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )


class GradientClipper:
    """Clips gradients, and skips the steps that would hurt. Decided on the device: nothing waits.

    A step is skipped where the norm of its gradients is not a number, or above `skip_above` times
    its running mean. Every rank sees the same norm, so all skip together.
    """

    NAMES = ("mean", "in_row", "longest", "total")

    def __init__(self, config: OptimizerConfig, device: torch.device) -> None:
        self.config = config
        # The running mean of the norm; the skipped steps in a row now, at most, and in all.
        self.numbers = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)

    def scale(self, norm: Tensor) -> Tensor:
        """What to multiply gradients of this norm by (fp32, no dimension); -1 skips the step."""
        mean, in_row, longest, total = self.numbers.unbind()
        known = mean > 0
        bad = ~norm.isfinite() | (known & (norm > self.config.skip_above * mean))
        moved = torch.where(known, mean + 0.01 * (norm - mean), norm.double())
        in_row = torch.where(bad, in_row + 1, 0.0)
        self.numbers = torch.stack(
            (torch.where(bad, mean, moved), in_row, torch.maximum(longest, in_row), total + bad)
        )
        scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        return torch.where(bad, -1.0, scale).float()

    def read(self) -> dict[str, float]:
        """The numbers by name; waits for the device."""
        return dict(zip(self.NAMES, self.numbers.tolist(), strict=True))

    def load(self, numbers: dict[str, float]) -> None:
        """Take up what `read` gave."""
        self.numbers.copy_(
            torch.tensor([numbers[name] for name in self.NAMES], dtype=torch.float64)
        )
