"""Projection of memory, traffic and step time of the presets at 8 to 512 GPUs. Nothing is run.

    python profiling/scale_plan.py [--out profiling/results]

For each preset, number of GPUs and stage of ZeRO: bytes on each GPU (`memory.estimate`), bytes each
sends per step (ring collectives), and a step time from ASSUMPTIONS. FLOPs are counted by
torch on the meta device. Writes scale_plan.json, a table to the screen, and scale_plan.svg.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro.training.batch_plan import BatchPlan, ShardingConfig, Stage, plan_batch
from miro.training.config import TrainConfig
from miro.training.flops import DEVICE_SPECS
from miro.training.memory import Memory, activation_bytes, estimate, parameter_count
from miro.training.presets import preset
from miro_kernels import use_backend

LATENT, TEXT_CHANNELS, TEXT_TOKENS = (4, 32, 32), 2048, 77
GPUS = (8, 16, 64, 512)
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Assumptions:
    """What the projection takes for granted; none of it was measured here."""

    gpu: str = "H100 SXM, 80 GB"
    peak: float = DEVICE_SPECS["NVIDIA H100 80GB HBM3"].flops
    """Dense bf16 FLOP/s."""
    utilisation: float = 0.35
    """Share of the peak that forward and backward reach. Public figures for training of diffusion
    transformers are 0.10 to 0.33 (shared/performance-anchors.md)."""
    memory_bandwidth: float = DEVICE_SPECS["NVIDIA H100 80GB HBM3"].bandwidth
    inside: float = 350e9
    """Bytes/s a GPU sends in a ring inside a machine of eight (NVLink 4)."""
    between: float = 40e9
    """Bytes/s a GPU sends to another machine (one 400 Gbit/s adapter a GPU)."""
    hidden: float = 0.7
    """Share of the collectives that computation hides."""
    room: float = 80 * 2**30


def images_flops(config: ModelConfig, rewards: int) -> float:
    """Forward FLOPs of one image, counted on tensors without data."""
    with torch.device("meta"):
        model = FlowTransformer(config, LATENT, TEXT_CHANNELS, rewards)
        x, t = torch.empty(1, *LATENT), torch.empty(1)
        offsets = torch.zeros(2, dtype=torch.int32)
        states = torch.empty(TEXT_TOKENS, TEXT_CHANNELS)
        bins = torch.zeros(1, rewards, dtype=torch.int64)
        told = RewardCond(torch.empty(64), bins, bins.bool())
    text = PackedText(states, offsets, TEXT_TOKENS)
    with use_backend("torch"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, told, model.encode_context(text))
    return float(counter.get_total_flops())


def sent(parameters: int, layout: BatchPlan) -> float:
    """Bytes that each rank sends in a step, bf16 weights and gradients, by ring collectives."""
    one = 2 * parameters * (layout.world - 1) / layout.world
    if layout.stage == 0:
        return (2 if layout.accumulation == 1 else 4) * one  # All-reduce, in fp32 if accumulated.
    if layout.stage == 1:
        return 2 * one  # Gradients to their owners, weights back.
    if layout.stage == 2:
        return (layout.accumulation + 1) * one  # Gradients of every micro-batch.
    return 3 * layout.accumulation * one  # Weights gathered twice, gradients reduced.


@dataclass(frozen=True)
class Row:
    """One line of the projection."""

    preset: str
    gpus: int
    stage: int
    micro_batch: int
    accumulation: int
    gpu_bytes: float
    parts: dict[str, float]
    fits: bool
    sent_bytes: float
    step_seconds: float
    images_per_second: float


def project(
    name: str, config: TrainConfig, gpus: int, stage: Stage, given: Assumptions, counts: tuple
) -> Row | None:
    """A row, with the largest micro-batch that fits; None where the batch does not divide."""
    parameters, flops = counts
    share = config.batch // gpus
    if share == 0 or config.batch % gpus:
        return None
    memory, layout = Memory(*(math.inf,) * 7), None
    micros = [share // k for k in range(1, share + 1) if share % k == 0]
    # Stage 1 accumulates nothing in bf16: the engine refuses it.
    for micro in micros[:1] if stage == 1 else micros:
        sharding = ShardingConfig(str(stage), micro)  # type: ignore[arg-type]
        layout = plan_batch(sharding, batch=config.batch, world=gpus, stage=stage)
        kept = activation_bytes(config.model, LATENT, layout, "bf16")
        memory = estimate(parameters, layout, "bf16", activations=kept)
        if memory.total <= 0.9 * given.room:
            break
    assert layout is not None
    compute = 3 * flops * share / (given.peak * given.utilisation)
    state = memory.masters + memory.moments + memory.average
    update = 2 * state / given.memory_bandwidth
    wire = sent(parameters, layout) / (given.inside if gpus <= 8 else given.between)
    seconds = compute + update + (1 - given.hidden) * wire
    return Row(
        name, gpus, stage, layout.micro_batch, layout.accumulation, memory.total, asdict(memory),
        memory.total <= 0.9 * given.room, sent(parameters, layout), seconds,
        config.batch / seconds,
    )  # fmt: skip


def draw(rows: list[Row]) -> Figure:
    """Memory of a GPU and step time by the number of GPUs, a panel a preset."""
    names = list(dict.fromkeys(row.preset for row in rows))
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    figure.suptitle("Projection, nothing was run (assumptions in scale_plan.json)", fontsize=10)
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False)
    for column, name in enumerate(names):
        for stage in STAGES:
            own = [row for row in rows if row.preset == name and row.stage == stage and row.fits]
            places = [row.gpus for row in own]
            top, bottom = axes[0][column], axes[1][column]
            top.plot(places, [row.gpu_bytes / 2**30 for row in own], "o-", label=f"stage {stage}")
            bottom.plot(places, [1e3 * row.step_seconds for row in own], "o-")
            top.set_title(name)
            top.set_ylabel("GiB on a GPU")
            bottom.set_ylabel("ms a step")
            bottom.set_yscale("log")
            bottom.set_xscale("log", base=2)
            bottom.set_xticks(GPUS, [str(n) for n in GPUS])
            bottom.set_xlabel("GPUs")
        axes[0][column].legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # It tells every font it lacks.
    given, rewards = Assumptions(), 7
    rows = []
    for name in ("small", "large"):
        config = preset(name)
        counts = (
            parameter_count(config.model, LATENT, TEXT_CHANNELS, rewards),
            images_flops(config.model, rewards),
        )
        print(
            f"{name}: {counts[0] / 1e9:.3f} B parameters, {counts[1] / 1e9:.0f} GFLOP an image "
            f"forward, batch {config.batch}"
        )
        print("  GPUs stage micro x accumulated  GiB a GPU   GB sent   ms a step   images/s")
        for gpus in GPUS:
            for stage in STAGES:
                row = project(name, config, gpus, stage, given, counts)
                if row is None:
                    continue
                rows.append(row)
                print(
                    f"  {gpus:4} {stage:5} {row.micro_batch:5} x {row.accumulation:<11} "
                    f"{row.gpu_bytes / 2**30:9.1f} {row.sent_bytes / 1e9:9.2f} "
                    f"{1e3 * row.step_seconds:11.0f} {row.images_per_second:10.0f}"
                    f"{'' if row.fits else '   does not fit'}"
                )
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "what": "projection; nothing was run",
        "command": "python profiling/scale_plan.py",
        "assumptions": asdict(given),
        "rows": [asdict(row) for row in rows],
    }
    (out / "scale_plan.json").write_text(json.dumps(record, indent=1))
    draw(rows).savefig(out / "scale_plan.svg")
    print(f"projection, nothing was run; assumptions and rows are in {out / 'scale_plan.json'}")


if __name__ == "__main__":
    main()
