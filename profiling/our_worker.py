"""Worker process of bench_step.py with our training step; its argument is the settings as JSON."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from bench_utils import BINS, LATENTS, REWARDS, TEXT_CHANNELS
from torch import Tensor
from worker import Phases, Step, serve

from miro import flow
from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro.training.batch_plan import BatchPlan
from miro.training.engine import Engine
from miro.training.flops import training_flops
from miro.training.metrics import MetricsTracker, StepRecord
from miro.training.presets import preset
from miro_kernels import use_backend


def narrowed(scale: int) -> ModelConfig:
    """The 0.36 B preset, its width divided by `scale`."""
    model = preset("small").model
    heads = max(1, model.heads // scale)
    return replace(
        model, channels=model.channels // scale, hidden=model.hidden // scale, heads=heads
    )


class OurStep(Step):
    """A step of the engine on random latents, texts and rewards.

    metrics: records every step if set.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.config = preset("small")
        torch.manual_seed(0)
        model = FlowTransformer(
            narrowed(settings["scale"]), LATENTS, TEXT_CHANNELS, REWARDS,
            regional_compile=settings["compiled"] and settings["device"] == "cpu",
        )  # fmt: skip
        # Zero-initialised layers would multiply everything after them by zero.
        for param in model.parameters():
            if not param.any():
                torch.nn.init.normal_(param, std=0.02)
        self.parameters = sum(param.numel() for param in model.parameters())
        self.metrics: MetricsTracker | None = None
        self.engine = Engine(
            model, self.config.optimizer, BatchPlan(0, 1, settings["batch"], 1),
            total_images=self.config.images, precision=settings["precision"],
            compiled=settings["compiled"], device=settings["device"],
        )  # fmt: skip

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor, RewardCond, PackedText]:
        """The random batch `number`: x, noise, t, rewards and text."""
        batch, device = self.settings["batch"], self.settings["device"]
        generator = torch.Generator().manual_seed(number)
        x, noise = (torch.randn(batch, *LATENTS, generator=generator) for _ in range(2))
        uniform = torch.rand(batch, generator=generator)
        t = flow.sample_timesteps(self.config.flow, uniform)
        bins = torch.randint(BINS, (batch, REWARDS), generator=generator)
        rewards = RewardCond(torch.arange(BINS) / (BINS - 1), bins, bins >= 0)
        lengths = self.settings["lengths"]
        offsets = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
        states = torch.randn(sum(lengths), TEXT_CHANNELS, generator=generator)
        text = PackedText(states, offsets, max(lengths))
        moved = RewardCond(*(tensor.to(device) for tensor in rewards))
        return x.to(device), noise.to(device), t.to(device), moved, text.to(device)

    def run(self, number: int, phases: Phases) -> Tensor:
        """Run a training step and return its loss."""
        with use_backend(self.settings["kernels"]):
            with phases("data"):
                x, noise, t, rewards, text = self.batch(number)
            with phases("forward"):
                predicted = self.engine.predict(flow.add_noise(x, noise, t), t, rewards, text)
                losses = flow.velocity_errors(self.config.flow, predicted, x, noise, t)
                loss = losses.mean()
            with phases("backward"):
                self.engine.backward(loss)
            with phases("optimizer"):
                norm = self.engine.step(self.config.optimizer.warmup_images)
            if self.metrics is not None:
                with phases("metrics"):
                    shapes = x.shape, text.states.shape, (REWARDS, BINS)
                    flops = training_flops(self.engine.model.config, *shapes)
                    record = StepRecord(losses.detach(), t, rewards, flops)
                    self.metrics.add(number * len(x), [record], norm)
        return loss.detach()

    def useful(self) -> Tensor:
        """Run a forward pass without padding, whose FLOPs count as useful."""
        x, _, t, rewards, text = self.batch(0)
        with use_backend(self.settings["kernels"]):
            return self.engine.model(x, t, rewards, self.engine.model.encode_context(text))


if __name__ == "__main__":
    serve(OurStep)
