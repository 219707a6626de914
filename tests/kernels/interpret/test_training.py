"""Training with the Triton kernels: losses equal torch's, and the network has no graph break."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro.training.batch_plan import ShardingConfig
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro_kernels import use_backend


def losses(run: Path) -> list[float]:
    lines = RunFolder(run).metrics.read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_of_a_few_steps_equal_those_of_the_torch_backend(
    training: TrainConfig, tmp_path: Path, device: str, optimizer: str
) -> None:
    few = replace(training, images=24, checkpoint_every=24, ema_weights_at=(), device=device)
    few = replace(few, model=replace(few.model, heads=1))
    few = replace(few, optimizer=replace(few.optimizer, name=optimizer))

    for kernels in ("torch", "triton"):
        train(replace(few, kernels=kernels), tmp_path / kernels)

    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "triton")),
        torch.tensor(losses(tmp_path / "torch")),
        rtol=2e-5,
        atol=0,
    )


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_losses_of_every_zero_stage_equal_those_of_stage_0(
    training: TrainConfig, tmp_path: Path, device: str, stage: Literal["1", "2", "3"]
) -> None:
    few = replace(training, images=24, checkpoint_every=24, ema_weights_at=(), device=device)
    few = replace(few, model=replace(few.model, heads=1))

    train(replace(few, kernels="torch"), tmp_path / "torch")
    train(replace(few, kernels="triton", sharding=ShardingConfig(stage)), tmp_path / "triton")

    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "triton")),
        torch.tensor(losses(tmp_path / "torch")),
        rtol=2e-5,
        atol=0,
    )


def test_the_network_compiles_without_a_graph_break(device: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(channels=32, depth=1, heads=1, hidden=16, patch=2)
    model = FlowTransformer(config, (1, 4, 4), 8, rewards=2).to(device)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    text = PackedText(torch.randn(3, 8), torch.tensor([0, 3, 3], dtype=torch.int32), 3).to(device)
    bins = torch.tensor([[0, 1], [2, 1]])
    rewards = RewardCond(torch.arange(3) / 2, bins, bins > 0)
    rewards = RewardCond(*(tensor.to(device) for tensor in rewards))
    x, t = torch.randn(2, 1, 4, 4, device=device), torch.rand(2, device=device)

    def gradients(predict: object) -> list[torch.Tensor]:
        model.zero_grad()
        out = predict(x, t, rewards, model.encode_context(text))  # type: ignore[operator]
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    with use_backend("triton"):
        eager = gradients(model)
        compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    with use_backend("torch"):
        reference = gradients(model)

    for a, b, c in zip(eager, compiled, reference, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=2e-5 * float(c.abs().max()))
