"""Memory traffic of interpreted kernels, and detection of invalid accesses.

    with count() as traffic:
        adaln(x, shift, scale)
    traffic.bytes, traffic.distinct

GPU memory moves in sectors of 32 bytes. `bytes` counts the sectors of every load and store of each
program, without any cache; `distinct` counts each sector of a launch once, as with an infinite
cache. DRAM traffic lies between the two. A value that one instruction broadcasts to several rows of
its tile counts once.

On exit `count` raises KernelFault for accesses that are undefined on a GPU:
  - lanes outside of the kernel's tensors, also in the gaps between the rows of a view;
  - two programs of a launch that write one address, or one that reads what another writes;
  - one store that writes an address twice;
  - a masked load without `other`, whose inactive lanes are undefined on a GPU (and NaN here).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from triton import language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from miro_kernels.lab.access_log import AccessLog, Launch
from miro_kernels.lab.interpreter import fp32_to_bf16, interpreting, patch_interpreter
from miro_kernels.lab.private_torch import disable_dispatch_modes
from miro_kernels.lab.private_triton import (
    GridExecutor,
    InterpreterBuilder,
    TensorHandle,
    interpreter_builder,
    interpreter_semantic,
    np_dtype,
)


class KernelFault(AssertionError):
    """An interpreted kernel accessed memory in a way that is undefined on a GPU."""


@dataclass
class Traffic:
    """The launches inside one `count`, in order, and their totals; sizes in bytes."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Sectors of every load and store, uncached."""
        return sum(launch.loaded + launch.stored for launch in self.launches)

    @property
    def distinct(self) -> int:
        """Distinct sectors of each launch, counted once for loads and once for stores."""
        return sum(launch.distinct_loaded + launch.distinct_stored for launch in self.launches)

    @property
    def atomics(self) -> int:
        """Atomic instructions of all programs."""
        return sum(launch.atomics for launch in self.launches)

    @property
    def multiplications(self) -> int:
        """Multiplications of the matrix products, masked elements included."""
        return sum(launch.multiplications for launch in self.launches)

    @property
    def faults(self) -> list[str]:
        """A description of each invalid access, the first of its kind in a launch."""
        return [fault for launch in self.launches for fault in launch.faults]


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """All tensors among a kernel's arguments, also those of tensor descriptors."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from tensors_in(argument)
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, Tensor):
            yield argument


def referenced_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """All living tensors whose address is an element of an int64 tensor, a table of pointers."""
    tables = [tensor for tensor in tensors if tensor.dtype == torch.int64]
    addresses = {value for table in tables for value in table.flatten().tolist()} - {0}
    if not addresses:
        return []
    living = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
    return [tensor for tensor in living if tensor.data_ptr() in addresses]


def _poison(dtype: Any, shape: tuple[int, ...]) -> TensorHandle:
    """Values of the inactive lanes of a load without `other`: NaN, or the largest integer."""
    np_type = np_dtype(dtype)
    if dtype.is_bf16():
        value: Any = fp32_to_bf16(np.array(np.nan))
    elif np_type.kind == "f":
        value = np.nan
    else:
        value = True if np_type.kind == "b" else np.iinfo(np_type).max
    return TensorHandle(np.full(shape, value, np_type), dtype)


class _InstrumentedInterpreter:
    """The interpreter's entry points, which record to an AccessLog and call `originals`."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.log: AccessLog | None = None
        self.without_other = False
        self.semantic_load = interpreter_semantic.load
        self.replacements: dict[str, Callable[..., Any]] = {
            "create_masked_load": self.masked_load,
            "create_masked_store": self.masked_store,
            "create_atomic_rmw": self.atomic_rmw,
            "create_atomic_cas": self.atomic_cas,
            "create_dot": self.dot,
        }
        self.originals: dict[str, Callable[..., Any]] = {
            name: getattr(InterpreterBuilder, name) for name in self.replacements
        }
        self.executor_call = GridExecutor.__call__

    def call(self, executor: GridExecutor, *arguments: Any, **options: Any) -> None:
        tensors = list(tensors_in((*arguments, *options.values())))
        self.log = AccessLog(executor.fn.__name__, tensors + referenced_tensors(tensors))
        # Do not count the torch operations by which the interpreter copies arguments.
        with disable_dispatch_modes():
            self.executor_call(executor, *arguments, **options)
        grid = interpreter_builder.grid_dim
        self.traffic.launches.append(self.log.summary(grid))
        self.log = None

    def load(self, pointer: Any, mask: Any, other: Any, *rest: Any) -> Any:
        """tl.load, the only entry point at which a missing `other` shows."""
        self.without_other = mask is not None and other is None
        return self.semantic_load(pointer, mask, other, *rest)

    def masked_load(
        self, builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any
    ) -> TensorHandle:
        assert self.log is not None
        dtype = pointers.get_element_ty()
        if self.without_other:
            program = tuple(builder.grid_idx)
            self.log.fault("without other", program, "loads with a mask and without `other`")
            other, self.without_other = _poison(dtype, pointers.data.shape), False
        size = np_dtype(dtype).itemsize
        inside = self._access(builder, "load", pointers, mask, size)
        return self.originals["create_masked_load"](
            builder, pointers, TensorHandle(inside, tl.int1), other, *rest, **named
        )

    def masked_store(
        self, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        inside = self._access(builder, "store", pointers, mask, value.data.dtype.itemsize)
        return self.originals["create_masked_store"](
            builder, pointers, value, TensorHandle(inside, tl.int1), *rest, **named
        )

    def atomic_rmw(
        self, builder: Any, operation: Any, pointer: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        assert self.log is not None
        size, program = value.data.dtype.itemsize, tuple(builder.grid_idx)
        self.log.atomic(pointer.data, _lanes(mask), size, program)
        return self.originals["create_atomic_rmw"](builder, operation, pointer, value, mask, *rest)

    def atomic_cas(self, builder: Any, pointer: Any, compare: Any, value: Any, *rest: Any) -> Any:
        assert self.log is not None
        size, program = value.data.dtype.itemsize, tuple(builder.grid_idx)
        self.log.atomic(pointer.data, np.ones(pointer.data.shape, bool), size, program)
        return self.originals["create_atomic_cas"](builder, pointer, compare, value, *rest)

    def dot(self, builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        assert self.log is not None
        self.log.multiplications += a.data.size * b.data.shape[-1]
        return self.originals["create_dot"](builder, a, b, *rest)

    def _access(self, builder: Any, kind: str, pointers: Any, mask: Any, size: int) -> np.ndarray:
        assert self.log is not None
        program = tuple(builder.grid_idx)
        return self.log.access(kind, pointers.data, _lanes(mask), size, program)


def _lanes(mask: Any) -> np.ndarray:
    """A mask as an array; tensor descriptors pass an array, other accesses a handle."""
    return mask.data if isinstance(mask, TensorHandle) else mask


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a bound method for use as a method of another class, whose instance it receives."""
    return lambda instance, *arguments, **named: function(instance, *arguments, **named)


@contextmanager
def count(check: bool = True) -> Iterator[Traffic]:
    """Count the traffic of every kernel launched inside.

    Args:
        check: raise KernelFault on exit for invalid accesses; `faults` lists them either way.
    """
    assert interpreting(), "counting traffic needs the interpreter: set TRITON_INTERPRET=1"
    patch_interpreter()
    traffic = Traffic()
    patched = _InstrumentedInterpreter(traffic)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(GridExecutor, "__call__", _method(patched.call)))
        patches.enter_context(mock.patch.object(interpreter_semantic, "load", patched.load))
        for name, method in patched.replacements.items():
            patches.enter_context(mock.patch.object(InterpreterBuilder, name, _method(method)))
        yield traffic
    if check and traffic.faults:
        raise KernelFault("\n".join(traffic.faults))
