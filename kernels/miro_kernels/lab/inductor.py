"""What torch.compile would generate for an H100, on a machine without one, and what it would move.

The rival of a fused kernel is not eager but Inductor, which fuses too. `generate` traces a function
and its gradient on CPU fakes, moves the two graphs to a pretended H100 and stops Inductor where it
has scheduled its kernels: the byte counts are Inductor's own (each kernel reads its inputs and
writes its outputs once), and nothing is compiled or run.

This reaches into private parts of torch; it was written for 2.14, and says so when they are gone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_utils import count_flops_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from miro_kernels.lab.eager import size

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    gcnArchName="",
    uuid="",
    is_integrated=False,
)


@dataclass(frozen=True)
class Call:
    """A kernel that Inductor scheduled."""

    op: str  # "triton", or what is called, as "aten::mm"
    bytes: int
    flops: int  # of matrix products


@dataclass(frozen=True)
class Generated:
    """What Inductor made of one graph."""

    kernels: tuple[str, ...]  # Triton kernels, and library calls by their name
    bytes: int
    source: str
    calls: tuple[Call, ...]


class Scheduled(BaseException):
    """Carries the result out of Inductor, past handlers of Exception: it is no error."""

    def __init__(self, generated: Generated) -> None:
        super().__init__()
        self.generated = generated


def generate(
    function: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[Generated, Generated | None]:
    """What Inductor generates for function(**arguments) and for its gradient.

    Args:
        arguments: tensors are taken for their shapes, strides and dtypes alone. The gradient is
            that of the floating tensors that require one; without such there is none.
    """
    graphs: list[Generated] = []

    def compiler(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., list[Any]]:
        outputs = [node.meta["val"] if hasattr(node, "meta") else node for node in _results(gm)]
        graphs.append(_schedule(gm, example_inputs, backward=bool(graphs)))
        return make_boxed_func(lambda *_: [_like(value) for value in outputs])

    caching = {"force_disable_caches": True, "fx_graph_cache": False, "compile_threads": 1}
    tensors = {name: v for name, v in arguments.items() if isinstance(v, Tensor)}
    others = {name: v for name, v in arguments.items() if name not in tensors}
    with config.patch(caching), FakeTensorMode(allow_non_fake_inputs=True) as mode:
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
        result: Any = compiled(*fakes)
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        leaves = [fake for fake in fakes if fake.requires_grad]
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(o) for o in outputs])
    forward, *backward = graphs
    return forward, backward[0] if backward else None


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    fake = mode.from_tensor(tensor.detach())
    return fake.requires_grad_(tensor.requires_grad)


def _results(graph: GraphModule) -> list[Any]:
    return list(graph.graph.output_node().args[0])  # type: ignore[arg-type]


def _like(value: Any, device: str | None = None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=device or value.device
    )


def _schedule(graph: GraphModule, inputs: Sequence[Any], backward: bool) -> Generated:
    """Move a traced graph to the pretended device and let Inductor schedule it there.

    It is traced on the CPU because autograd's engine refuses fakes on a device without a driver.
    """
    moved = GraphModule(graph, copy.deepcopy(graph.graph))
    for node in moved.graph.nodes:
        node.meta.pop("tensor_meta", None)
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(Tensor, lambda t: _like(t, "cuda"), node.meta["val"])
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    try:
        with pretended_h100():
            compile_fx_inner(moved, [_like(i, "cuda") for i in inputs], is_backward=backward)
    except Scheduled as scheduled:
        return scheduled.generated
    raise RuntimeError("Inductor compiled without GraphLowering.compile_to_module: not torch 2.14?")


def _stop(lowering: GraphLowering) -> None:
    code, _ = lowering.codegen()
    source = str(getattr(code, "value", code))
    calls = re.findall(r"^(triton_\w+) = async_compile|^ +[^#\n]*extern_kernels\.(\w+)\(|"
                       r"^ +[^#\n]*torch\.ops\.aten\.(\w+)", source, re.M)  # fmt: skip
    kernels = tuple(name for call in calls for name in call if name)
    scheduled = tuple(map(_call, filter(_launches, lowering.scheduler.nodes)))
    raise Scheduled(Generated(kernels, int(lowering.count_bytes()[0]), source, scheduled))


def _launches(node: BaseSchedulerNode) -> bool:
    """Whether the node is a kernel, and not memory or one of the results of a kernel."""
    return not (isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput))


def _call(node: BaseSchedulerNode) -> Call:
    if not node.is_extern() or node.node is None:
        return Call("triton", int(node.get_read_write_buffers_sizes()), 0)
    # What is called is an operation of the graph, be it one with several outputs. Inductor counts
    # the whole of a buffer of which a view is given.
    overload = getattr(node.node, "op_overload", None)
    origins = [o for o in node.node.get_origins() if overload in (None, o.target)]
    origin = node.node.get_origin_node() or origins[0]
    given = [n.meta["val"] for n in origin.all_input_nodes]
    moved = (t for t in tree_leaves([given, origin.meta["val"]]) if isinstance(t, Tensor))
    return Call(origin.target._schema.name, size(*moved), int(count_flops_fx(origin) or 0))


@contextmanager
def pretended_h100() -> Iterator[None]:
    """Torch, dynamo and triton believe in one H100 that is never used."""
    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "get_device_properties": lambda *_: H100,
    }
    of_torch = {
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: H100.name,
        "is_initialized": lambda: False,
        "get_rng_state": lambda *_: torch.empty(0),
        "set_rng_state": lambda *_: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda *_: -1,
        "_maybe_exchange_device": lambda *_: -1,
    }
    of_dynamo = {
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
        for name, function in (functions | of_torch).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for name, function in (functions | of_dynamo).items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(function)))
        for name in ("get_device_properties", "current_device"):
            worker = mock.patch.object(CudaInterface.Worker, name, staticmethod(functions[name]))
            stack.enter_context(worker)
        stack.enter_context(mock.patch("torch.utils._triton.has_triton", lambda *_, **__: True))
        stack.enter_context(mock.patch.object(driver, "_active", stub))
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", _stop))
        yield
