"""Whole training steps of the 0.36 B preset on a GPU, for gpu_check.py."""

from __future__ import annotations

import statistics

import torch
from bench_utils import BINS, LATENTS, REWARDS, TEXT_CHANNELS, seconds

from miro import flow
from miro.model.packed_text import pack
from miro.model.transformer import FlowTransformer, RewardCond
from miro.training.batch_plan import BatchPlan
from miro.training.engine import Engine
from miro.training.presets import preset
from miro_kernels import use_backend

DEVICE = "cuda"
STEP_BATCH = 64
STEPS = {
    "kernels": ("triton", False),
    "eager": ("torch", False),
    "kernels, rest compiled": ("triton", True),
    "compiled": ("torch", True),
}


def training_steps(name: str, steps: int = 12) -> dict[str, float]:
    """Time and memory of an optimizer step of the 0.36 B preset, and the loss at the end."""
    backend, compiled = STEPS[name]
    config = preset("small")
    torch.manual_seed(0)
    model = FlowTransformer(config.model, LATENTS, TEXT_CHANNELS, REWARDS)
    engine = Engine(
        model, config.optimizer, BatchPlan(0, 1, STEP_BATCH, 1), total_images=config.images,
        precision="bf16", compiled=compiled, device=DEVICE,
    )  # fmt: skip
    draw = torch.Generator(DEVICE).manual_seed(1)
    x, noise = (torch.randn(STEP_BATCH, *LATENTS, generator=draw, device=DEVICE) for _ in range(2))
    t = torch.rand(STEP_BATCH, generator=draw, device=DEVICE)
    bins = torch.randint(BINS, (STEP_BATCH, REWARDS), generator=draw, device=DEVICE)
    levels = torch.linspace(0, 1, BINS, device=DEVICE)
    rewards = RewardCond(levels, bins, bins > BINS // 8)
    lengths = [8 + 37 * n % 120 for n in range(STEP_BATCH)]
    text = pack([torch.randn(n, TEXT_CHANNELS) for n in lengths]).to(DEVICE, torch.bfloat16)
    losses = []

    def step() -> None:
        predicted = engine.predict(flow.add_noise(x, noise, t), t, rewards, text)
        loss = flow.velocity_errors(config.flow, predicted, x, noise, t).mean()
        engine.backward(loss)
        engine.step(config.optimizer.warmup_images)
        losses.append(loss.detach())

    with use_backend(backend):
        times = [1e3 * seconds(step, DEVICE) for _ in range(steps)]
    return {
        "milliseconds": statistics.median(times[steps // 3 :]),
        "loss": float(losses[-1]),
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9,
    }


def steps_table(steps: dict[str, dict[str, float]]) -> list[str]:
    """Format the steps as lines of Markdown."""
    lines = [
        f"\nTraining step of the 0.36 B preset, {STEP_BATCH} images, whole: forward, backward, "
        "clipping and optimizer.\n",
        "| | ms | images/s | loss | GB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, step in steps.items():
        rate = STEP_BATCH / step["milliseconds"] * 1e3
        lines.append(
            f"| {name} | {step['milliseconds']:.1f} | {rate:.0f} | {step['loss']:.5f} | "
            f"{step['gigabytes']:.1f} |"
        )
    return lines
