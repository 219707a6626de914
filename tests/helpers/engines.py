"""Small engines and batches for the tests of the engine."""

from typing import Any

import torch
from torch import Tensor

from miro.model.packed_text import PackedText, pack
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro.training.batch_plan import BatchPlan
from miro.training.engine import Engine
from miro.training.optimizer import OptimizerConfig

SHAPE, TEXT, REWARDS = (2, 4, 4), 6, 2
CONFIG = OptimizerConfig(learning_rate=0.01, weight_decay=0.1)


def build(width: int = 16, rewards: int = REWARDS, **options: Any) -> FlowTransformer:
    """A network without zero-initialized weights, so that every parameter has a gradient."""
    torch.manual_seed(0)
    model = FlowTransformer(ModelConfig(width, 1, 2, 24, 2), SHAPE, TEXT, rewards, **options)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape)
    return model


PLAN = BatchPlan(stage=0, world=1, micro_batch=4, accumulation=1)


def engine(
    config: OptimizerConfig = CONFIG, model: FlowTransformer | None = None, **options: Any
) -> Engine:
    options = {"plan": PLAN, "total_images": 400, **options}
    if model is None:
        model = build(activation_checkpointing=options["plan"].activation_checkpointing)
    return Engine(model, config, **options)


def learn(engine: Engine, loss: Tensor, images: int) -> Tensor:
    engine.backward(loss)
    return engine.step(images)


def inputs(seed: int, batch: int = 4) -> tuple[Tensor, Tensor, RewardCond, PackedText]:
    generator = torch.Generator().manual_seed(seed)
    rewards = RewardCond(
        torch.linspace(0, 1, 5),
        torch.randint(5, (batch, REWARDS), generator=generator),
        torch.rand(batch, REWARDS, generator=generator) < 0.7,
    )
    text = pack([torch.randn(n % 3, TEXT, generator=generator) for n in range(batch)])
    x = torch.randn(batch, *SHAPE, generator=generator)
    return x, torch.rand(batch, generator=generator), rewards, text
