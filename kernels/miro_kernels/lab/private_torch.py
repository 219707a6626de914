"""Private names of torch that the lab uses, imported here only; written for torch 2.14."""

# ruff: noqa: F401
import torch.utils._triton as triton_support
from torch._C import DispatchKey, DispatchKeySet
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_utils import count_flops_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_dispatch_modes
from torch.utils._pytree import tree_leaves, tree_map_only

ATTRIBUTES = """
    BaseSchedulerNode.get_read_write_buffers_sizes BaseSchedulerNode.is_extern
    CudaInterface.Worker.current_device CudaInterface.Worker.get_device_properties
    CudaInterface.get_compute_capability CudaInterface.exchange_device
    CudaInterface.maybe_exchange_device GraphLowering.codegen GraphLowering.compile_to_module
    GraphLowering.count_bytes triton_support.has_triton
""".split()
"""What the lab calls or patches on them; tests/kernels/test_private_names.py checks each."""
