"""Every operation of a training step: FLOPs, bytes and launches, and what they would take on a GPU.

    python profiling/step_budget.py [--preset small] [--batch 64] [--text 65]

Counted on tensors without data, of a forward and backward pass in bf16 and the optimizer: eager
torch, and the fused kernels with the rest eager. An operation reads each input once and writes each
output once; an operation of several kernels counts as one launch, but ours as what they are.
Eager's attention is counted as the products, softmax and copies that torch makes of it where no
library has it whole. What torch.compile would move for an operation is in kernel_report.py. The
time is a PROJECTION: for each operation the larger of its FLOPs and its bytes over what DEVICES
say, and no host. Writes budget-PRESET.json, and budget-PRESET.svg: the groups on a roofline.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measured import machine, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from miro.engine import cast_parameters
from miro.model.transformer import FlowTransformer, ModelConfig, Rewards
from miro.peaks import PEAKS
from miro.presets import preset
from miro.text import PackedText
from miro_kernels import use_backend
from miro_kernels.backend import capturing
from miro_kernels.lab.eager import FREE, OVERWRITING

HERE = Path(__file__).parent
LATENTS, TEXT_CHANNELS, REWARDS, LEVELS = (4, 32, 32), 2048, 7, 64

# Kernels that an op of miro_kernels launches; tests/kernels/compiled/test_launches.py counts them.
LAUNCHES = {
    "reward_adaln": 1, "reward_gated_residual_adaln": 1, "reward_adaln_backward": 3,
    "reward_gated_residual_adaln_backward": 3, "qk_norm_rope": 1, "qk_norm_rope_backward": 2,
    "attention": 1, "attention_backward": 2, "swiglu": 1, "swiglu_backward": 1,
}  # fmt: skip
GEMMS = {"mm", "addmm", "bmm", "baddbmm"}
MOVING = {"cat", "clone", "copy_", "_to_copy", "index", "index_copy", "index_select", "stack"}
MOVING |= {
    "slice_backward",
    "select_backward",
    "fill_",
    "zero_",
    "zeros",
    "zeros_like",
    "ones_like",
}
MOVING |= {"new_zeros", "index_add", "_index_put_impl_", "arange"}
# Bytes of a parameter that AdamWEMA moves: gradient and copy in bf16, and four fp32 states twice.
OPTIMIZER_BYTES = 2 + 2 + 8 * 4


@dataclass(frozen=True)
class Device:
    """What a device is taken to reach."""

    flops: float
    """Dense bf16 FLOP/s of the data sheet."""
    bandwidth: float
    """Bytes/s of the data sheet."""
    gemm: float = 0.79
    """Share of `flops` that matrix products reach: 784 of 989 TFLOP/s, measured on the H100
    (results/gpu-NVIDIA-H100-*.json); the same share elsewhere is an assumption."""
    attention: float = 0.25
    """Share of `flops` that attention reaches, whatever computes it: 0.2 to 0.3 there."""
    memory: float = 0.80
    """Share of `bandwidth` that everything else reaches; a copy reached 0.90 there."""
    launch: float = 2e-6
    """Seconds between one kernel's end and the next one's start, the host being ahead."""


DEVICES = {
    name: Device(PEAKS[whole].flops, PEAKS[whole].bandwidth)
    for name, whole in (
        ("H100 SXM", "NVIDIA H100 80GB HBM3"),
        ("H200", "NVIDIA H200"),
        ("B200", "NVIDIA B200"),
        ("MI300X", "AMD Instinct MI300X"),
    )
}


@dataclass
class Row:
    """An operation of the step, all its calls together."""

    op: str
    group: str
    calls: int = 0
    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0

    def seconds(self, device: Device) -> float:
        share = device.attention if self.group == "attention" else device.gemm
        arithmetic = self.flops / (device.flops * share)
        movement = self.bytes / (device.bandwidth * device.memory)
        return max(arithmetic, movement) + self.launches * device.launch


def group_of(op: str, namespace: str) -> str:
    """What an operation is for."""
    if "attention" in op:
        return "attention"
    if op in GEMMS:
        return "GEMM"
    if namespace == "miro":
        return "fused"
    return "data movement" if op in MOVING else "elementwise and reductions"


class Budget(TorchDispatchMode):
    """Adds up what runs inside, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Row] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = func.overloadpacket._qualified_op_name.split("::")[1]
        if op in FREE or op in ("lift_fresh", "scalar_tensor"):
            return out
        row = self.rows.setdefault(op, Row(op, group_of(op, func.namespace)))
        row.calls += 1
        row.launches += LAUNCHES[op] if func.namespace == "miro" else 1
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            row.flops += formula(*args, **kwargs, out_val=out)
        read = [] if op in OVERWRITING else [*tensors(args), *tensors(kwargs)]
        row.bytes += sum(map(stored, [*read, *tensors(out)]))
        return out


def tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def stored(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; what is expanded lies in memory once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride or not length else 1
    return elements * tensor.element_size()


@dataclass(frozen=True)
class Inputs:
    """A batch without data."""

    x: Tensor
    t: Tensor
    rewards: Rewards
    text: PackedText


def inputs(batch: int, text: int, device: str) -> Inputs:
    with torch.device(device):
        bins = torch.zeros(batch, REWARDS, dtype=torch.int64)
        states = torch.empty(batch * text, TEXT_CHANNELS, dtype=torch.bfloat16)
        offsets = torch.arange(batch + 1, dtype=torch.int32) * text
        return Inputs(
            torch.empty(batch, *LATENTS), torch.empty(batch),
            Rewards(torch.empty(LEVELS), bins, bins.bool()), PackedText(states, offsets, text),
        )  # fmt: skip


def network(config: ModelConfig, device: str) -> FlowTransformer:
    with torch.device(device):
        model = FlowTransformer(config, LATENTS, TEXT_CHANNELS, REWARDS)
    return cast_parameters(model, "bf16")


def forward(model: FlowTransformer, given: Inputs) -> Tensor:
    return model(given.x, given.t, given.rewards, model.read_text(given.text))


def budget(config: ModelConfig, batch: int, text: int, backend: str) -> list[Row]:
    """The rows of a step, the optimizer last; `backend` computes the fused operations."""
    model, given = network(config, "meta"), inputs(batch, text, "meta")
    with ExitStack() as stack:
        stack.enter_context(use_backend(backend))
        if backend == "triton":
            stack.enter_context(capturing())
        found = stack.enter_context(Budget())
        out = forward(model, given)
        out.square().mean().backward()
    return [*found.rows.values(), optimizer(model)]


def optimizer(model: nn.Module) -> Row:
    """AdamWEMA in all rows: one launch for the parameters of a group, matrices and others."""
    parameters = sum(param.numel() for param in model.parameters())
    return Row("AdamWEMA", "optimizer", 1, 2, 0.0, OPTIMIZER_BYTES * parameters)


def grouped(rows: list[Row]) -> list[Row]:
    """The rows of each group as one, the group for its name."""
    found: dict[str, Row] = {}
    for row in rows:
        total = found.setdefault(row.group, Row(row.group, row.group))
        total.calls += row.calls
        total.launches += row.launches
        total.flops += row.flops
        total.bytes += row.bytes
    return list(found.values())


def projected(rows: list[Row], device: Device) -> float:
    """Seconds of a step by the assumptions of `device`."""
    return sum(row.seconds(device) for row in rows)


def draw(variants: dict[str, list[Row]], device: Device, name: str) -> Figure:
    """Groups by their FLOPs a byte, under what the device is taken to reach."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"Projection for {name}: nothing here was timed", fontsize=10)
    intensities = [10 ** (power / 20) for power in range(-40, 81)]
    bound = [min(device.flops, device.bandwidth * i) / 1e12 for i in intensities]
    axes.plot(intensities, bound, color="black", linewidth=1)
    markers = dict(zip(variants, "osD^", strict=False))
    colours: dict[str, str] = {}
    for variant, rows in variants.items():
        for row in grouped(rows):
            if not row.bytes:
                continue
            colour = colours.setdefault(row.group, f"C{len(colours)}")
            # What only moves bytes lies at the left edge, at its bandwidth.
            intensity = max(row.flops / row.bytes, 1e-2)
            rate = max(row.flops, 1e-2 * row.bytes) / row.seconds(device) / 1e12
            axes.scatter(intensity, rate, marker=markers[variant], color=colour, s=28)
    for variant, marker in markers.items():
        axes.scatter([], [], marker=marker, color="grey", label=variant)
    for group, colour in colours.items():
        axes.scatter([], [], color=colour, label=group)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    axes.legend(fontsize=7)
    return figure


def table(variants: dict[str, list[Row]], batch: int) -> str:
    lines = []
    for variant, rows in variants.items():
        lines.append(f"{variant}\n  {'':28}{'launches':>9}{'TFLOP':>9}{'GB':>9}{'ms, H100':>10}")
        for row in grouped(rows):
            lines.append(
                f"  {row.group:28}{row.launches:9}{row.flops / 1e12:9.2f}{row.bytes / 1e9:9.2f}"
                f"{1e3 * row.seconds(DEVICES['H100 SXM']):10.2f}"
            )
        times = {name: projected(rows, device) for name, device in DEVICES.items()}
        shown = ", ".join(
            f"{name} {1e3 * seconds:.1f} ms ({batch / seconds:.0f} images/s)"
            for name, seconds in times.items()
        )
        lines.append(f"  projected: {shown}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--text", type=int, default=65, help="tokens of every text")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    config = preset(given.preset).model
    variants = {
        "eager": budget(config, given.batch, given.text, "torch"),
        "fused": budget(config, given.batch, given.text, "triton"),
    }
    print(table(variants, given.batch))
    print("projection, nothing was run: the assumptions are in the JSON")
    record = {
        **machine("cpu"),
        "settings": {"preset": given.preset, "batch": given.batch, "text": given.text},
        "assumptions": {name: asdict(device) for name, device in DEVICES.items()},
        "variants": {
            name: {
                "counted": {
                    row.group: {k: v for k, v in asdict(row).items() if k not in ("op", "group")}
                    for row in grouped(rows)
                },
                "operations": [asdict(row) for row in rows],
                "projected_seconds": {n: projected(rows, d) for n, d in DEVICES.items()},
            }
            for name, rows in variants.items()
        },
    }
    path = given.out / f"budget-{given.preset}.json"
    write(record, path)
    draw(variants, DEVICES["H100 SXM"], "an H100").savefig(path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
