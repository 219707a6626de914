"""Every operation of a training step: FLOPs, bytes and launches, and what they would take on a GPU.

    python profiling/step_budget.py [--preset small] [--batch 64] [--text 65]

Counted on tensors without data, of a forward and backward pass in bf16 and the optimizer: eager
torch, the fused kernels with the rest eager, and what Inductor schedules of both for an H100
(inductor_step.py; it takes minutes, which `--without-inductor` saves). An operation reads each
input once and writes each output once; an operation of several kernels counts as one launch, but
ours as what they are. Eager's attention is counted as the products, softmax and copies that torch
makes of it where no library has it whole.

The time is a PROJECTION: for each operation the larger of its FLOPs and its bytes over what the
devices of roofline.py reach, and no host. Writes budget-PRESET.json, and budget-PRESET.svg: the
groups on a roofline.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from charts import standalone
from inductor_step import inductor_rows
from measured import machine, write
from operations import LAUNCHES, group_of
from pictures import pictures
from result_files import read
from roofline import DEVICES, Row, grouped, projected
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

HERE = Path(__file__).parent
LATENTS, TEXT_CHANNELS, REWARDS, LEVELS = (4, 32, 32), 2048, 7, 64

# Operations that compute nothing on a device.
HOST = {"lift_fresh", "scalar_tensor", "promote_types"}
# Bytes of a parameter that AdamWEMA moves: gradient and copy in bf16, and four fp32 states twice.
OPTIMIZER_BYTES = 2 + 2 + 8 * 4


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
        if op in FREE or op in HOST:
            return out
        row = self.rows.setdefault(op, Row(op, group_of(op, func.namespace)))
        row.calls += 1
        row.launches += LAUNCHES[op] if func.namespace == "miro" else 1
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            row.flops += formula(*args, **kwargs, out_val=out)
        read = [] if op in OVERWRITING else [*tensors(args), *tensors(kwargs)]
        row.bytes += size(*read, *tensors(out))
        return out


def tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


@dataclass(frozen=True)
class Inputs:
    """A batch without data."""

    x: Tensor
    t: Tensor
    rewards: RewardCond
    text: PackedText


def inputs(batch: int, text: int, device: str) -> Inputs:
    with torch.device(device):
        bins = torch.zeros(batch, REWARDS, dtype=torch.int64)
        states = torch.empty(batch * text, TEXT_CHANNELS, dtype=torch.bfloat16)
        offsets = torch.arange(batch + 1, dtype=torch.int32) * text
        return Inputs(
            torch.empty(batch, *LATENTS), torch.empty(batch),
            RewardCond(torch.empty(LEVELS), bins, bins.bool()), PackedText(states, offsets, text),
        )  # fmt: skip


def network(config: ModelConfig, device: str) -> FlowTransformer:
    with torch.device(device):
        model = FlowTransformer(config, LATENTS, TEXT_CHANNELS, REWARDS)
    return cast_parameters(model, "bf16")


def forward(model: FlowTransformer, given: Inputs) -> Tensor:
    return model(given.x, given.t, given.rewards, model.encode_context(given.text))


def budget(config: ModelConfig, batch: int, text: int, backend: str) -> list[Row]:
    """The rows of a step, the optimizer last; `backend` computes the fused operations."""
    model, given = network(config, "meta"), inputs(batch, text, "meta")
    with ExitStack() as stack:
        stack.enter_context(use_backend(backend))
        if backend == "triton":
            stack.enter_context(allow_cpu_tensors())
        found = stack.enter_context(Budget())
        out = forward(model, given)
        out.square().mean().backward()
    return [*found.rows.values(), optimizer(model)]


def compiled_budget(config: ModelConfig, batch: int, text: int, fused: bool) -> list[Row]:
    """The rows of a step by Inductor, the optimizer last. The weights are there, on the CPU."""
    model, given = network(config, "cpu"), inputs(batch, text, "cpu")
    rows = inductor_rows(model, given.x, given.t, given.rewards, given.text, fused)
    return [*rows, optimizer(model)]


def optimizer(model: nn.Module) -> Row:
    """AdamWEMA in all rows: one launch for the parameters of a group, matrices and others."""
    parameters = sum(param.numel() for param in model.parameters())
    return Row("AdamWEMA", "optimizer", 1, 2, 0.0, OPTIMIZER_BYTES * parameters)


def useful_flops(config: ModelConfig, batch: int, text: int) -> float:
    """Of a step: what miro/training/flops.py says it cannot do without."""
    return training_flops(
        config, (batch, *LATENTS), (batch * text, TEXT_CHANNELS), (REWARDS, LEVELS)
    )


def table(variants: dict[str, list[Row]], batch: int, useful: float) -> str:
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
        executed = sum(row.flops for row in rows)
        lines.append(f"  FLOPs executed over useful: {executed / useful:.4f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--text", type=int, default=65, help="tokens of every text")
    parser.add_argument("--without-inductor", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    config = preset(given.preset).model
    variants = {
        "eager": budget(config, given.batch, given.text, "torch"),
        "fused": budget(config, given.batch, given.text, "triton"),
    }
    if not given.without_inductor:
        for variant, fused in (("torch.compile", False), ("fused, rest compiled", True)):
            variants[variant] = compiled_budget(config, given.batch, given.text, fused)
    useful = useful_flops(config, given.batch, given.text)
    print(table(variants, given.batch, useful))
    print("projection, nothing was run: the assumptions are in the JSON")
    record = {
        **machine("cpu"),
        "settings": {"preset": given.preset, "batch": given.batch, "text": given.text},
        "assumptions": {name: asdict(device) for name, device in DEVICES.items()},
        "useful_flops": useful,
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
    picture = pictures(read(path))[0]
    drawn = standalone(picture.figure, path.stem, picture.title, picture.note)
    path.with_suffix(".svg").write_text(drawn, "utf-8")


if __name__ == "__main__":
    main()
