"""Kernels that torch.compile would generate for an H100, and their bytes, without a GPU.

A fused kernel competes with Inductor, which fuses too, rather than with eager mode. `generate`
traces a function and its gradient on CPU fake tensors, moves both graphs to a mocked H100 and stops
Inductor after scheduling. Byte counts are Inductor's own (each kernel reads its inputs and writes
its outputs once); nothing is compiled or run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule
from triton.backends.compiler import GPUTarget

from miro_kernels.lab.eager import size
from miro_kernels.lab.private_torch import (
    BaseSchedulerNode,
    CudaInterface,
    FakeTensorMode,
    GraphLowering,
    MultiOutput,
    NopKernelSchedulerNode,
    aot_function,
    compile_fx_inner,
    count_flops_fx,
    inductor_config,
    make_boxed_func,
    min_cut_rematerialization_partition,
    select_decomp_table,
    tree_leaves,
    tree_map_only,
    triton_support,
)
from miro_kernels.lab.private_triton import driver
from miro_kernels.lab.testing import outputs_of

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    total_memory=80 * 2**30, L2_cache_size=50 * 2**20, clock_rate=1980000,
    memory_clock_rate=2619000, memory_bus_width=5120, gcnArchName="", uuid="", is_integrated=False,
)  # fmt: skip
"""Device properties as torch.cuda.get_device_properties returns them."""


@dataclass(frozen=True)
class Call:
    """A kernel or library call that Inductor scheduled."""

    op: str  # "triton", or the library operation, such as "aten::mm"
    bytes: int
    flops: int  # of matrix products


@dataclass(frozen=True)
class Generated:
    """Inductor's schedule of one graph."""

    calls: tuple[Call, ...]
    bytes: int


class Scheduled(BaseException):
    """Returns the schedule from inside Inductor; BaseException passes its exception handlers."""

    def __init__(self, generated: Generated) -> None:
        super().__init__()
        self.generated = generated


def generate(
    function: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[Generated, Generated | None]:
    """Schedule function(**arguments) and its gradient.

    Args:
        function: takes `arguments` by keyword; traced as is, without Dynamo.
        arguments: only shapes, strides, dtypes and `requires_grad` of tensors are used.

    Returns:
        The forward graph, and the backward graph, or None if no tensor requires a gradient.
    """
    graphs: list[Generated] = []

    def compiler(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., list[Any]]:
        outputs = [
            node.meta["val"] if hasattr(node, "meta") else node for node in _graph_outputs(gm)
        ]
        graphs.append(_schedule(gm, example_inputs, backward=bool(graphs)))
        return make_boxed_func(lambda *_: [_empty_like(value) for value in outputs])

    no_cache = {"force_disable_caches": True, "fx_graph_cache": False, "compile_threads": 1}
    tensors = {name: v for name, v in arguments.items() if isinstance(v, Tensor)}
    others = {name: v for name, v in arguments.items() if name not in tensors}
    with inductor_config.patch(no_cache), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [_fake(mode, tensor) for tensor in tensors.values()]

        def positional(*values: Tensor) -> Any:
            return function(**dict(zip(tensors, values, strict=True)), **others)

        compiled = aot_function(
            positional,
            fw_compiler=compiler,
            bw_compiler=compiler,
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )
        outputs = outputs_of(compiled(*fakes))
        leaves = [fake for fake in fakes if fake.requires_grad]
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(o) for o in outputs])
    forward, *backward = graphs
    return forward, backward[0] if backward else None


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    fake = mode.from_tensor(tensor.detach())
    return fake.requires_grad_(tensor.requires_grad)


def _graph_outputs(graph: GraphModule) -> list[Any]:
    return list(graph.graph.output_node().args[0])  # type: ignore[arg-type]


def _empty_like(value: Any, device: str | None = None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=device or value.device
    )


def _schedule(graph: GraphModule, inputs: Sequence[Any], backward: bool) -> Generated:
    """Move a graph to the mocked device and let Inductor schedule it there.

    Graphs are traced on the CPU because autograd rejects fake tensors of a device without driver.
    """
    moved = GraphModule(graph, copy.deepcopy(graph.graph))
    for node in moved.graph.nodes:
        node.meta.pop("tensor_meta", None)
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(
                Tensor, lambda t: _empty_like(t, "cuda"), node.meta["val"]
            )
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    try:
        with mocked_h100():
            compile_fx_inner(moved, [_empty_like(i, "cuda") for i in inputs], is_backward=backward)
    except Scheduled as scheduled:
        return scheduled.generated
    raise RuntimeError("Inductor did not call GraphLowering.compile_to_module, as torch 2.14 does")


def _stop(lowering: GraphLowering) -> None:
    """Stands in for GraphLowering.compile_to_module."""
    lowering.codegen()
    calls = tuple(map(_call, filter(_launches, lowering.scheduler.nodes)))
    raise Scheduled(Generated(calls, int(lowering.count_bytes()[0])))


def _launches(node: BaseSchedulerNode) -> bool:
    """Whether the node is a kernel, not an allocation or one output of a kernel."""
    return not (isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput))


def _call(node: BaseSchedulerNode) -> Call:
    if not node.is_extern() or node.node is None:
        return Call("triton", int(node.get_read_write_buffers_sizes()), 0)
    # Count the graph operation's tensors: Inductor's count of a view is that of its whole buffer.
    overload = getattr(node.node, "op_overload", None)
    origins = [o for o in node.node.get_origins() if overload in (None, o.target)]
    origin = node.node.get_origin_node() or origins[0]
    inputs = [n.meta["val"] for n in origin.all_input_nodes]
    moved = (t for t in tree_leaves([inputs, origin.meta["val"]]) if isinstance(t, Tensor))
    return Call(origin.target._schema.name, size(*moved), int(count_flops_fx(origin) or 0))


@contextmanager
def mocked_h100() -> Iterator[None]:
    """Make torch, Dynamo and Triton report one H100, which is never used."""
    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "get_device_properties": lambda *_: H100,
    }
    torch_only = {
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: H100.name,
        "is_initialized": lambda: False,
        "get_rng_state": lambda *_: torch.empty(0),
        "set_rng_state": lambda *_: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda *_: -1,
        "_maybe_exchange_device": lambda *_: -1,
    }
    dynamo_only = {
        "get_compute_capability": lambda *_: 90,
        "exchange_device": lambda *_: -1,
        "maybe_exchange_device": lambda *_: -1,
    }
    stub = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
    )
    with ExitStack() as stack:
        for name, function in (functions | torch_only).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for name, function in (functions | dynamo_only).items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(function)))
        for name in ("get_device_properties", "current_device"):
            worker = mock.patch.object(CudaInterface.Worker, name, staticmethod(functions[name]))
            stack.enter_context(worker)
        stack.enter_context(mock.patch.object(triton_support, "has_triton", lambda *_, **__: True))
        stack.enter_context(mock.patch.object(driver, "_active", stub))
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", _stop))
        yield
