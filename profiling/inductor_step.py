"""What torch.compile would launch and move in a whole training step on an H100, without one.

The step is that of step_budget.py, on the plain torch functions or on the fused operations, traced
as two graphs, forward and backward, and scheduled by Inductor as if for an H100
(miro_kernels/lab/inductor.py). Its rows are what Inductor says of its own kernels and of those it
calls: each reads its inputs and writes its outputs once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import worker  # noqa: F401 (it counts attention on a CPU, where the step is traced)
from operations import LAUNCHES, group_of
from roofline import Row
from torch import Tensor, nn
from torch.func import functional_call

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, RewardCond
from miro_kernels import use_backend
from miro_kernels.backend import allow_cpu_tensors
from miro_kernels.lab.case_metrics import eager_as_on_a_gpu
from miro_kernels.lab.inductor import Generated, generate


class Whole(nn.Module):
    """The network from what a batch brings to a loss, of tensors alone."""

    def __init__(self, model: FlowTransformer, longest: int) -> None:
        super().__init__()
        self.model, self.longest = model, longest

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        rewards = RewardCond(given["levels"], given["bins"], given["keep"])
        text = PackedText(given["states"], given["offsets"], self.longest)
        out = self.model(given["x"], given["t"], rewards, self.model.encode_context(text))
        return out.square().mean()


def inductor_rows(
    model: FlowTransformer,
    x: Tensor,
    t: Tensor,
    rewards: RewardCond,
    text: PackedText,
    fused: bool,
) -> list[Row]:
    """Forward and backward of the network, on a CPU, on a batch of these shapes.

    fused: with the fused operations as they are, which Inductor calls as it does a library's.
    """
    whole = Whole(model, text.longest)
    weights = dict(whole.named_parameters()) | dict(whole.named_buffers())
    given = rewards._asdict() | {"x": x, "t": t, "states": text.states, "offsets": text.offsets}
    names = {f"given_{name}": name for name in given} | {
        f"weight_{number}": name for number, name in enumerate(weights)
    }
    values = {short: (given | weights)[name] for short, name in names.items()}

    def step(**tensors: Tensor) -> Any:
        by_name = {names[short]: tensor for short, tensor in tensors.items()}
        batch = {name: by_name.pop(name) for name in given}
        return functional_call(whole, by_name, (batch,))

    # The kernels' checks read the texts' lengths where nothing is compiled.
    tracing = mock.patch.object(torch.compiler, "is_compiling", lambda: True)
    with tracing, fused_without_gpu() if fused else eager_as_on_a_gpu():
        graphs = generate(step, values)
    return rows_of(*(graph for graph in graphs if graph is not None))


@contextmanager
def fused_without_gpu() -> Iterator[None]:
    """The fused operations are called, and none is run."""
    with use_backend("triton"), allow_cpu_tensors():
        yield


def rows_of(*graphs: Generated) -> list[Row]:
    """The calls of the graphs by their operation."""
    rows: dict[str, Row] = {}
    for call in itertools.chain(*(graph.calls for graph in graphs)):
        namespace, _, op = call.op.rpartition("::")
        row = rows.setdefault(op, Row(op, group_of(op, namespace)))
        row.calls += 1
        row.launches += LAUNCHES[op] if namespace == "miro" else 1
        row.flops += call.flops
        row.bytes += call.bytes
    return list(rows.values())
