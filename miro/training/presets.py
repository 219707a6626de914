"""Presets: named training configurations, each a function."""

from __future__ import annotations

from collections.abc import Callable

from miro.flow import FlowConfig
from miro.model.transformer import ModelConfig
from miro.training.config import TrainConfig
from miro.training.optimizer import OptimizerConfig
from miro.utils.serialize import unknown_name


def demo() -> TrainConfig:
    """Return the demo: 32 x 32 pixels on two CPU cores, in minutes; shows the effect of MIRO."""
    return TrainConfig(
        model=ModelConfig(channels=192, depth=6, heads=3, hidden=512, patch=8),
        images=131_200,
        batch=64,
        flow=FlowConfig(
            prediction_type="sample",
            timestep_distribution="logit_normal",
            timestep_mean=1.0,
            loss_weight_clip=0.3,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=2e-3,
            beta2=0.95,
            warmup_images=6_400,
            decay_from=0.8,
            ema_halflife_images=4_500,
        ),
        precision="bf16",
        compile=True,
        threads=1,
        report_every=1_280,
        checkpoint_every=12_800,
    )


def small() -> TrainConfig:
    """Return the size of the paper's model: 0.36 B parameters, 32 x 32 x 4 latents, 256 tokens."""
    return TrainConfig(
        model=ModelConfig(channels=1024, depth=21, heads=16, hidden=3072, patch=2),
        images=512_000_000,
        batch=1024,
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            warmup_images=5_120_000,
            weight_decay=0.01,
            ema_halflife_images=2_000_000,
        ),
        precision="bf16",
        compile=True,
        device="cuda",
        report_every=102_400,
        checkpoint_every=5_120_000,
    )


def large() -> TrainConfig:
    """Return about 2 B parameters on 32 x 32 x 4 latents, for sharded training."""
    return TrainConfig(
        model=ModelConfig(channels=2048, depth=34, heads=16, hidden=5632, patch=2),
        images=512_000_000,
        batch=2048,
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
            warmup_images=10_240_000,
            weight_decay=0.01,
            ema_halflife_images=4_000_000,
        ),
        precision="bf16",
        compile=True,
        device="cuda",
        report_every=204_800,
        checkpoint_every=10_240_000,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {"demo": demo, "small": small, "large": large}


def preset(name: str) -> TrainConfig:
    """Return a preset by name.

    Raises:
        ValueError: there is none of that name; the message suggests the nearest.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]()
