"""The memory traffic of interpreted kernels, counted, and the accesses that are wrong, found.

    with count() as traffic:
        adaln(x, shift, scale)
    traffic.bytes, traffic.distinct

A GPU moves memory in sectors of 32 bytes. `bytes` counts the sectors of every load and store of a
program as if nothing were cached; `distinct` counts each sector of a launch once, as if everything
were. What DRAM sees lies between the two. A value that one instruction loads for several rows of
its tile (a broadcast) counts once.

On leaving, KernelFault is raised with every access that a GPU would punish or, worse, would not:
  - lanes outside of the tensors a kernel was given, elements between the rows of a view included;
  - two programs of a launch writing one address, or one reading what another writes;
  - one store writing an address twice;
  - a masked load without `other`, whose idle lanes are undefined on a GPU (and NaN here).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from miro_kernels.lab.interpret import correct, interpreting, to_bits

SECTOR = 32


class KernelFault(AssertionError):
    """An interpreted kernel touched memory in a way that a GPU does not forgive."""


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel; sizes in bytes."""

    kernel: str
    grid: tuple[int, ...]
    loaded: int
    stored: int
    distinct_loaded: int
    distinct_stored: int
    atomics: int
    products: int  # multiplications of matrix products
    faults: tuple[str, ...]


@dataclass
class Traffic:
    launches: list[Launch] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Sectors of every load and store, nothing cached."""
        return sum(launch.loaded + launch.stored for launch in self.launches)

    @property
    def distinct(self) -> int:
        """Sectors each launch touches, each counted once for loads and once for stores."""
        return sum(launch.distinct_loaded + launch.distinct_stored for launch in self.launches)

    @property
    def atomics(self) -> int:
        return sum(launch.atomics for launch in self.launches)

    @property
    def products(self) -> int:
        """Multiplications of the matrix products, those of masked elements included."""
        return sum(launch.products for launch in self.launches)

    @property
    def faults(self) -> list[str]:
        return [fault for launch in self.launches for fault in launch.faults]


class Region:
    """The addresses of a tensor's elements."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.start = tensor.data_ptr()
        # The inmost dimensions that lie without gaps are one run of bytes.
        dims = [(s * size, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
        dims = sorted((dim for dim in dims if dim[0] > 0), reverse=True)
        self.run = size
        while dims and dims[-1][0] <= self.run:
            stride, count = dims.pop()
            self.run = stride * (count - 1) + self.run
        self.dims = dims
        self.end = self.start + self.run + sum(stride * (count - 1) for stride, count in dims)

    def holds(self, addresses: np.ndarray, size: int) -> np.ndarray:
        rest = addresses - self.start
        inside = (rest >= 0) & (addresses + size <= self.end)
        for stride, count in self.dims:
            index = np.minimum(rest // stride, count - 1)
            rest = rest - index * stride
        return inside & (rest + size <= self.run)


class Recorder:
    """The accesses of one launch."""

    def __init__(self, kernel: str, tensors: list[Tensor]) -> None:
        self.kernel = kernel
        self.regions = [Region(tensor) for tensor in tensors if tensor.numel()]
        self.moved = {"load": 0, "store": 0}
        self.sectors: dict[str, list[np.ndarray]] = {"load": [], "store": []}
        self.written_regions: set[int] = set()
        self.loads: list[tuple[tuple, np.ndarray, set[int]]] = []
        self.stores: list[tuple[tuple, np.ndarray]] = []
        self.atomics = self.products = 0
        self.faults: dict[str, str] = {}  # by kind: the first of each is enough

    def fault(self, kind: str, program: tuple, text: str) -> None:
        self.faults.setdefault(kind, f"{self.kernel}: program {program} {text}")

    def access(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int, program: tuple
    ) -> np.ndarray:
        """Note a load or store; returns the mask without its lanes that are out of bounds."""
        addresses = pointers.astype(np.int64)
        mask = np.broadcast_to(np.asarray(mask, bool), addresses.shape)
        inside, touched = np.zeros(addresses.shape, bool), set()
        for number, region in enumerate(self.regions):
            here = region.holds(addresses, size) & mask
            if here.any():
                inside |= here
                touched.add(number)
            if inside.sum() == mask.sum():
                break
        if (outside := int((mask & ~inside).sum())) > 0:
            self.fault(f"outside {kind}", program, f"{kind}s {outside} elements out of bounds")
        lanes = addresses[inside]
        unique = lanes if (np.diff(lanes) > 0).all() else np.unique(lanes)
        sectors = np.unique(unique // SECTOR)
        self.moved[kind] += sectors.size * SECTOR
        self.sectors[kind].append(sectors)
        if kind == "store":
            if unique.size < lanes.size:
                self.fault("twice", program, "writes an address twice in one store")
            self.written_regions |= touched
            self.stores.append((program, unique))
        else:
            self.loads.append((program, unique, touched))
        return inside

    def atomic(self, pointers: np.ndarray, mask: np.ndarray, size: int, program: tuple) -> None:
        """Note an atomic: it reads and writes, and races with nothing."""
        self.atomics += 1
        for records in (self.loads, self.stores):
            kind = "load" if records is self.loads else "store"
            self.access(kind, pointers, mask, size, program)
            records.pop()

    def find_races(self) -> None:
        if not self.stores:
            return
        programs = sorted({program for program, _ in self.stores})
        number = {program: index for index, program in enumerate(programs)}
        written = np.concatenate([addresses for _, addresses in self.stores])
        writers = np.concatenate([np.full(a.size, number[p]) for p, a in self.stores])
        if written.size == 0:
            return
        order = np.argsort(written, kind="stable")
        written, writers = written[order], writers[order]
        clash = (written[1:] == written[:-1]) & (writers[1:] != writers[:-1])
        if clash.any():
            first = int(clash.argmax())
            other = programs[writers[first + 1]]
            self.fault("race", programs[writers[first]], f"writes what program {other} writes")
        for program, addresses, touched in self.loads:
            if not touched & self.written_regions:
                continue
            place = np.minimum(np.searchsorted(written, addresses), written.size - 1)
            found = (written[place] == addresses) & (writers[place] != number.get(program, -1))
            if found.any():
                other = programs[writers[place[int(found.argmax())]]]
                self.fault("read race", program, f"reads what program {other} writes")

    def launch(self, grid: tuple[int, ...]) -> Launch:
        self.find_races()
        distinct = {
            kind: int(np.unique(np.concatenate(sectors)).size) * SECTOR if sectors else 0
            for kind, sectors in self.sectors.items()
        }
        return Launch(
            kernel=self.kernel,
            grid=grid,
            loaded=self.moved["load"],
            stored=self.moved["store"],
            distinct_loaded=distinct["load"],
            distinct_stored=distinct["store"],
            atomics=self.atomics,
            products=self.products,
            faults=tuple(self.faults.values()),
        )


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """Every tensor among a kernel's arguments, those behind tensor descriptors included."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from tensors_in(argument)
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, Tensor):
            yield argument


def pointed_to(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors whose addresses stand in the int64 ones among `tensors`: tables of pointers."""
    tables = [tensor for tensor in tensors if tensor.dtype == torch.int64]
    addresses = {value for table in tables for value in table.flatten().tolist()} - {0}
    if not addresses:
        return []
    living = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return [tensor for tensor in living if tensor.data_ptr() in addresses]


def _poison(dtype: Any, shape: tuple[int, ...]) -> TensorHandle:
    """What idle lanes of a load hold: NaN, or the largest integer."""
    kind = interpreter._get_np_dtype(dtype)
    if dtype.is_bf16():
        value: Any = to_bits(np.array(np.nan))
    elif kind.kind == "f":
        value = np.nan
    else:
        value = True if kind.kind == "b" else np.iinfo(kind).max
    return TensorHandle(np.full(shape, value, kind), dtype)


class Instruments:
    """The interpreter's entry points, with a Recorder listening; `originals` do the work."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.recorder: Recorder | None = None
        self.unfilled = False
        self.semantic_load = interpreter.interpreter_semantic.load
        self.originals: dict[str, Callable[..., Any]] = {
            name: getattr(InterpreterBuilder, name)
            for name in (
                "create_masked_load",
                "create_masked_store",
                "create_atomic_rmw",
                "create_atomic_cas",
                "create_dot",
            )
        }
        self.executor_call = GridExecutor.__call__

    def call(self, executor: GridExecutor, *arguments: Any, **options: Any) -> None:
        given = list(tensors_in((*arguments, *options.values())))
        self.recorder = Recorder(executor.fn.__name__, given + pointed_to(given))
        # The interpreter moves arguments by torch operations that no launch has.
        with _disable_current_modes():
            self.executor_call(executor, *arguments, **options)
        grid = interpreter.interpreter_builder.grid_dim
        self.traffic.launches.append(self.recorder.launch(grid))
        self.recorder = None

    def load(self, pointer: Any, mask: Any, other: Any, *rest: Any) -> Any:
        """tl.load, where alone it can be seen whether `other` was given."""
        self.unfilled = mask is not None and other is None
        return self.semantic_load(pointer, mask, other, *rest)

    def masked_load(
        self, builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any
    ) -> TensorHandle:
        assert self.recorder is not None
        dtype = pointers.get_element_ty()
        if self.unfilled:
            program = tuple(builder.grid_idx)
            self.recorder.fault("unfilled", program, "loads with a mask and without `other`")
            other, self.unfilled = _poison(dtype, pointers.data.shape), False
        size = interpreter._get_np_dtype(dtype).itemsize
        inside = self._access(builder, "load", pointers, mask, size)
        return self.originals["create_masked_load"](
            builder, pointers, TensorHandle(inside, interpreter.tl.int1), other, *rest, **named
        )

    def masked_store(
        self, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        inside = self._access(builder, "store", pointers, mask, value.data.dtype.itemsize)
        return self.originals["create_masked_store"](
            builder, pointers, value, TensorHandle(inside, interpreter.tl.int1), *rest, **named
        )

    def atomic_rmw(
        self, builder: Any, operation: Any, pointer: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        assert self.recorder is not None
        size, program = value.data.dtype.itemsize, tuple(builder.grid_idx)
        self.recorder.atomic(pointer.data, _lanes(mask), size, program)
        return self.originals["create_atomic_rmw"](builder, operation, pointer, value, mask, *rest)

    def atomic_cas(self, builder: Any, pointer: Any, compare: Any, value: Any, *rest: Any) -> Any:
        assert self.recorder is not None
        size, program = value.data.dtype.itemsize, tuple(builder.grid_idx)
        self.recorder.atomic(pointer.data, np.ones(pointer.data.shape, bool), size, program)
        return self.originals["create_atomic_cas"](builder, pointer, compare, value, *rest)

    def dot(self, builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        assert self.recorder is not None
        self.recorder.products += a.data.size * b.data.shape[-1]
        return self.originals["create_dot"](builder, a, b, *rest)

    def _access(self, builder: Any, kind: str, pointers: Any, mask: Any, size: int) -> np.ndarray:
        assert self.recorder is not None
        program = tuple(builder.grid_idx)
        return self.recorder.access(kind, pointers.data, _lanes(mask), size, program)


def _lanes(mask: Any) -> np.ndarray:
    """A mask's lanes; those of tensor descriptors come without a handle."""
    return mask.data if isinstance(mask, TensorHandle) else mask


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method as one of another class, which gets that class's instance first."""
    return lambda instance, *arguments, **named: function(instance, *arguments, **named)


@contextmanager
def count(check: bool = True) -> Iterator[Traffic]:
    """Count the traffic of every kernel launched inside, and raise KernelFault for its faults.

    Args:
        check: whether to raise; the faults are listed in the result in any case.
    """
    assert interpreting(), "traffic is counted in the interpreter: set TRITON_INTERPRET=1"
    correct()
    traffic = Traffic()
    instruments = Instruments(traffic)
    builder = partial(mock.patch.object, InterpreterBuilder)
    with (
        mock.patch.object(GridExecutor, "__call__", _method(instruments.call)),
        mock.patch.object(interpreter.interpreter_semantic, "load", instruments.load),
        builder("create_masked_load", _method(instruments.masked_load)),
        builder("create_masked_store", _method(instruments.masked_store)),
        builder("create_atomic_rmw", _method(instruments.atomic_rmw)),
        builder("create_atomic_cas", _method(instruments.atomic_cas)),
        builder("create_dot", _method(instruments.dot)),
    ):
        yield traffic
    if check and traffic.faults:
        raise KernelFault("\n".join(traffic.faults))
