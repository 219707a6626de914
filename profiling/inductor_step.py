"""Launches and bytes of a training step compiled by Inductor for an H100, without a GPU.

The step of step_budget.py, with plain torch functions or the fused operators, is traced into a
forward and a backward graph, which Inductor schedules for an H100 (miro_kernels/lab/inductor.py).
Every kernel and library call reads its inputs and writes its outputs once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import worker  # noqa: F401 (registers the FLOPs of attention on a CPU)
from roofline import LAUNCHES, Operation, group_of
from torch import Tensor, nn
from torch.func import functional_call

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, RewardCond
from miro_kernels import use_backend
from miro_kernels.backend import allow_cpu_tensors
from miro_kernels.lab.case_metrics import eager_as_on_a_gpu
from miro_kernels.lab.inductor import Generated, generate


class TracedStep(nn.Module):
    """The network and a loss as a function of tensors alone."""

    def __init__(self, model: FlowTransformer, longest: int) -> None:
        super().__init__()
        self.model, self.longest = model, longest

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch."""
        rewards = RewardCond(batch["levels"], batch["bins"], batch["keep"])
        text = PackedText(batch["states"], batch["offsets"], self.longest)
        out = self.model(batch["x"], batch["t"], rewards, self.model.encode_context(text))
        return out.square().mean()


def inductor_operations(
    model: FlowTransformer,
    x: Tensor,
    t: Tensor,
    rewards: RewardCond,
    text: PackedText,
    fused: bool,
) -> list[Operation]:
    """Operations of forward and backward on a batch of these shapes, on the CPU.

    fused: keep the fused operators as opaque calls.
    """
    module = TracedStep(model, text.longest)
    weights = dict(module.named_parameters()) | dict(module.named_buffers())
    inputs = rewards._asdict() | {"x": x, "t": t, "states": text.states, "offsets": text.offsets}
    names = {f"input_{name}": name for name in inputs} | {
        f"weight_{number}": name for number, name in enumerate(weights)
    }
    values = {short: (inputs | weights)[name] for short, name in names.items()}

    def step(**tensors: Tensor) -> Any:
        by_name = {names[short]: tensor for short, tensor in tensors.items()}
        batch = {name: by_name.pop(name) for name in inputs}
        return functional_call(module, by_name, (batch,))

    # Otherwise the kernels' argument checks read the text lengths.
    tracing = mock.patch.object(torch.compiler, "is_compiling", lambda: True)
    with tracing, fused_without_gpu() if fused else eager_as_on_a_gpu():
        graphs = generate(step, values)
    return operations_of(*(graph for graph in graphs if graph is not None))


@contextmanager
def fused_without_gpu() -> Iterator[None]:
    """Trace the fused operators without running them."""
    with use_backend("triton"), allow_cpu_tensors():
        yield


def operations_of(*graphs: Generated) -> list[Operation]:
    """Sum the calls of the graphs by operation."""
    operations: dict[str, Operation] = {}
    for call in itertools.chain(*(graph.calls for graph in graphs)):
        namespace, _, op = call.op.rpartition("::")
        row = operations.setdefault(op, Operation(op, group_of(op, namespace)))
        row.calls += 1
        row.launches += LAUNCHES[op] if namespace == "miro" else 1
        row.flops += call.flops
        row.bytes += call.bytes
    return list(operations.values())
