"""Project memory, communication and step time of the presets on 8 to 512 GPUs.

    python profiling/scale_plan.py [--out profiling/results]

For each preset, number of GPUs and ZeRO stage: memory per GPU (`memory.estimate`), bytes sent per
GPU and step (ring collectives), and a step time by `Assumptions`. Nothing is run; FLOPs are counted
on the meta device. Writes scale_plan.json, which report.py plots too, and scale_plan.svg.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass

from bench_utils import LATENTS, REWARDS, TEXT_CHANNELS, argument_parser, metadata, write_json
from count_flops import ours
from matplotlib.figure import Figure

from miro.training.batch_plan import BatchPlan, Stage
from miro.training.config import TrainConfig
from miro.training.flops import DEVICE_SPECS
from miro.training.memory import Memory, activation_bytes, estimate, parameter_count
from miro.training.presets import preset

TEXT_TOKENS = 77
GPUS = (8, 16, 64, 512)
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of the projection; none of them was measured here."""

    gpu: str = "H100 SXM, 80 GB"
    peak: float = DEVICE_SPECS["NVIDIA H100 80GB HBM3"].flops
    """Dense bf16 FLOP/s."""
    utilisation: float = 0.35
    """MFU of forward and backward; published diffusion transformers reach 0.10 to 0.33."""
    memory_bandwidth: float = DEVICE_SPECS["NVIDIA H100 80GB HBM3"].bandwidth
    intra_node_bandwidth: float = 350e9
    """Bytes/s per GPU in a ring of eight GPUs (NVLink 4)."""
    inter_node_bandwidth: float = 40e9
    """Bytes/s per GPU to another machine (one 400 Gbit/s adapter per GPU)."""
    overlap: float = 0.7
    """Share of communication that overlaps with computation."""
    memory_capacity: float = 80 * 2**30


def sent_bytes(parameters: int, layout: BatchPlan) -> float:
    """Bytes that each rank sends per step by ring collectives, weights and gradients in bf16."""
    once = 2 * parameters * (layout.world - 1) / layout.world
    if layout.stage == 0:
        return (2 if layout.accumulation == 1 else 4) * once  # all-reduce, in fp32 if accumulated
    if layout.stage == 1:
        return 2 * once  # reduce-scatter gradients, all-gather weights
    if layout.stage == 2:
        return (layout.accumulation + 1) * once  # gradients of every micro-batch
    return 3 * layout.accumulation * once  # two all-gathers, one reduce-scatter


@dataclass(frozen=True)
class Plan:
    """Projection of a preset on a number of GPUs with a ZeRO stage."""

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
) -> Plan | None:
    """Project with the largest micro-batch that fits; None if the batch is not divisible."""
    parameters, flops = counts
    share = config.batch // gpus
    if share == 0 or config.batch % gpus:
        return None
    memory, layout = Memory(*(math.inf,) * 7), None
    micros = [share // k for k in range(1, share + 1) if share % k == 0]
    # The engine does not support accumulation with stage 1.
    for micro in micros[:1] if stage == 1 else micros:
        layout = BatchPlan(stage, gpus, micro, share // micro)
        activations = activation_bytes(config.model, LATENTS, layout, "bf16")
        memory = estimate(parameters, layout, "bf16", activations=activations)
        if memory.total <= 0.9 * given.memory_capacity:
            break
    assert layout is not None
    compute = 3 * flops * share / (given.peak * given.utilisation)
    state = memory.masters + memory.moments + memory.average
    update = 2 * state / given.memory_bandwidth
    wire = sent_bytes(parameters, layout) / (
        given.intra_node_bandwidth if gpus <= 8 else given.inter_node_bandwidth
    )
    seconds = compute + update + (1 - given.overlap) * wire
    return Plan(
        name, gpus, stage, layout.micro_batch, layout.accumulation, memory.total, asdict(memory),
        memory.total <= 0.9 * given.memory_capacity, sent_bytes(parameters, layout), seconds,
        config.batch / seconds,
    )  # fmt: skip


def draw(rows: list[Plan]) -> Figure:
    """Plot memory per GPU and step time by number of GPUs and preset."""
    names = list(dict.fromkeys(row.preset for row in rows))
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    figure.suptitle("Projection, nothing was run (assumptions in scale_plan.json)", fontsize=10)
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False)
    for column, name in enumerate(names):
        for stage in STAGES:
            own = [row for row in rows if row.preset == name and row.stage == stage and row.fits]
            gpus = [row.gpus for row in own]
            top, bottom = axes[0][column], axes[1][column]
            top.plot(gpus, [row.gpu_bytes / 2**30 for row in own], "o-", label=f"stage {stage}")
            bottom.plot(gpus, [1e3 * row.step_seconds for row in own], "o-")
            top.set_title(name)
            top.set_ylabel("GiB per GPU")
            bottom.set_ylabel("ms per step")
            bottom.set_yscale("log")
            bottom.set_xscale("log", base=2)
            bottom.set_xticks(GPUS, [str(n) for n in GPUS])
            bottom.set_xlabel("GPUs")
        axes[0][column].legend(frameon=False)
    return figure


def main() -> None:
    """Project memory and step times of clusters, and write them."""
    out = argument_parser(__doc__).parse_args().out
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hides warnings on missing fonts
    given = Assumptions()
    rows = []
    for name in ("small", "large"):
        config = preset(name)
        counts = (
            parameter_count(config.model, LATENTS, TEXT_CHANNELS, REWARDS),
            ours(name, config.model, TEXT_TOKENS, LATENTS).forward,
        )
        print(
            f"{name}: {counts[0] / 1e9:.3f} B parameters, {counts[1] / 1e9:.0f} GFLOP per image "
            f"forward, batch {config.batch}"
        )
        print("  GPUs stage micro x accumulated  GiB per GPU   GB sent   ms/step   images/s")
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
    record = {
        **metadata("cpu"),
        "assumptions": asdict(given),
        "rows": [asdict(row) for row in rows],
    }
    write_json(record, out / "scale_plan.json")
    draw(rows).savefig(out / "scale_plan.svg")
    print(f"projection, nothing was run; assumptions and rows are in {out / 'scale_plan.json'}")


if __name__ == "__main__":
    main()
