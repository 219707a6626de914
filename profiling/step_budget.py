"""FLOPs, bytes and launches of a training step, and its projected time on a GPU.

    python profiling/step_budget.py [--preset small] [--batch 64] [--text 65]

Forward, backward and optimizer in bf16 are counted on the meta device: eager, with the fused
kernels and the rest eager, and both compiled by Inductor for an H100 (inductor_step.py, which takes
minutes; --without-inductor skips it). An operation reads each input and writes each output once,
and counts as one launch, except for the launches of our kernels. Eager attention is counted as
matrix products, softmax and copies.

The time is a PROJECTION by the roofline model of roofline.py, without host time. Writes
budget-PRESET.json; report.py plots it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bench_utils import (
    BINS,
    LATENTS,
    REWARDS,
    TEXT_CHANNELS,
    argument_parser,
    metadata,
    write_json,
)
from inductor_step import inductor_operations
from roofline import DEVICES, LAUNCHES, Operation, by_group, group_of, project
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro.training.engine import cast_parameters
from miro.training.flops import training_flops
from miro.training.presets import preset
from miro_kernels import use_backend
from miro_kernels.backend import allow_cpu_tensors
from miro_kernels.lab.eager import FREE, OVERWRITING, size

# Operations that run on the host only.
HOST = {"lift_fresh", "scalar_tensor", "promote_types"}
# Per parameter: gradient and bf16 weight, and four fp32 states read and written.
OPTIMIZER_BYTES = 2 + 2 + 8 * 4


class Budget(TorchDispatchMode):
    """Sums FLOPs, bytes and launches of the operations in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, Operation] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = func.overloadpacket._qualified_op_name.split("::")[1]
        if op in FREE or op in HOST:
            return out
        row = self.operations.setdefault(op, Operation(op, group_of(op, func.namespace)))
        row.calls += 1
        row.launches += LAUNCHES[op] if func.namespace == "miro" else 1
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            row.flops += formula(*args, **kwargs, out_val=out)
        read = [] if op in OVERWRITING else [*tensors(args), *tensors(kwargs)]
        row.bytes += size(*read, *tensors(out))
        return out


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested values."""
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


@dataclass(frozen=True)
class Inputs:
    """A batch of uninitialised tensors."""

    x: Tensor
    t: Tensor
    rewards: RewardCond
    text: PackedText


def inputs(batch: int, text: int, device: str) -> Inputs:
    """A batch with `text` tokens per sample."""
    with torch.device(device):
        bins = torch.zeros(batch, REWARDS, dtype=torch.int64)
        states = torch.empty(batch * text, TEXT_CHANNELS, dtype=torch.bfloat16)
        offsets = torch.arange(batch + 1, dtype=torch.int32) * text
        return Inputs(
            torch.empty(batch, *LATENTS), torch.empty(batch),
            RewardCond(torch.empty(BINS), bins, bins.bool()), PackedText(states, offsets, text),
        )  # fmt: skip


def network(config: ModelConfig, device: str) -> FlowTransformer:
    """The network in bf16."""
    with torch.device(device):
        model = FlowTransformer(config, LATENTS, TEXT_CHANNELS, REWARDS)
    return cast_parameters(model, "bf16")


def forward(model: FlowTransformer, batch: Inputs) -> Tensor:
    """Run the network on a batch."""
    return model(batch.x, batch.t, batch.rewards, model.encode_context(batch.text))


def budget(config: ModelConfig, batch: int, text: int, backend: str) -> list[Operation]:
    """Operations of a step, the optimizer last; `backend` runs the fused operators."""
    model, data = network(config, "meta"), inputs(batch, text, "meta")
    with ExitStack() as stack:
        stack.enter_context(use_backend(backend))
        if backend == "triton":
            stack.enter_context(allow_cpu_tensors())
        budget = stack.enter_context(Budget())
        forward(model, data).square().mean().backward()
    return [*budget.operations.values(), optimizer(model)]


def compiled_budget(config: ModelConfig, batch: int, text: int, fused: bool) -> list[Operation]:
    """Operations of a step compiled by Inductor, with weights on the CPU, the optimizer last."""
    model, data = network(config, "cpu"), inputs(batch, text, "cpu")
    found = inductor_operations(model, data.x, data.t, data.rewards, data.text, fused)
    return [*found, optimizer(model)]


def optimizer(model: nn.Module) -> Operation:
    """AdamWEMA, with one launch per parameter group."""
    parameters = sum(param.numel() for param in model.parameters())
    return Operation("AdamWEMA", "optimizer", 1, 2, 0.0, OPTIMIZER_BYTES * parameters)


def useful_flops(config: ModelConfig, batch: int, text: int) -> float:
    """Useful FLOPs of a step by miro/training/flops.py."""
    return training_flops(config, (batch, *LATENTS), (batch * text, TEXT_CHANNELS), (REWARDS, BINS))


def counts(operations: list[Operation]) -> dict[str, dict[str, float]]:
    """Calls, launches, FLOPs and bytes of each group."""
    groups: dict[str, dict[str, float]] = {}
    for row in operations:
        group = groups.setdefault(
            row.group, {"calls": 0, "launches": 0, "flops": 0.0, "bytes": 0.0}
        )
        for key in group:
            group[key] += getattr(row, key)
    return groups


def projected_seconds(operations: list[Operation]) -> dict[str, float]:
    """Projected seconds of a step by device."""
    return {n: float(project(operations, d)["seconds"].sum()) for n, d in DEVICES.items()}


def table(variants: dict[str, list[Operation]], batch: int, useful: float) -> str:
    """Format the groups, the projected time and the FLOPs of each variant."""
    lines = []
    for variant, rows in variants.items():
        lines.append(f"{variant}\n  {'':28}{'launches':>9}{'TFLOP':>9}{'GB':>9}{'ms, H100':>10}")
        for group, row in by_group(project(rows, DEVICES["H100 SXM"])).iterrows():
            lines.append(
                f"  {group:28}{row['launches']:9.0f}{row['flops'] / 1e12:9.2f}"
                f"{row['bytes'] / 1e9:9.2f}{1e3 * row['seconds']:10.2f}"
            )
        times = projected_seconds(rows)
        shown = ", ".join(
            f"{name} {1e3 * seconds:.1f} ms ({batch / seconds:.0f} images/s)"
            for name, seconds in times.items()
        )
        lines.append(f"  projected: {shown}")
        executed = sum(row.flops for row in rows)
        lines.append(f"  FLOPs executed over useful: {executed / useful:.4f}")
    return "\n".join(lines)


def main() -> None:
    """Break down a step by roofline, and write the result."""
    parser = argument_parser(__doc__)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--text", type=int, default=65, help="tokens per text")
    parser.add_argument("--without-inductor", action="store_true")
    args = parser.parse_args()
    config = preset(args.preset).model
    variants = {
        "eager": budget(config, args.batch, args.text, "torch"),
        "fused": budget(config, args.batch, args.text, "triton"),
    }
    if not args.without_inductor:
        for variant, fused in (("torch.compile", False), ("fused, rest compiled", True)):
            variants[variant] = compiled_budget(config, args.batch, args.text, fused)
    useful = useful_flops(config, args.batch, args.text)
    print(table(variants, args.batch, useful))
    print("projection, nothing was run; the assumptions are in the JSON")
    record = {
        **metadata("cpu"),
        "settings": {"preset": args.preset, "batch": args.batch, "text": args.text},
        "assumptions": {name: asdict(device) for name, device in DEVICES.items()},
        "useful_flops": useful,
        "variants": {
            name: {
                "counted": counts(rows),
                "operations": [asdict(row) for row in rows],
                "projected_seconds": projected_seconds(rows),
            }
            for name, rows in variants.items()
        },
    }
    write_json(record, args.out / f"budget-{args.preset}.json")


if __name__ == "__main__":
    main()
