"""Global memory accesses of one interpreted launch: bytes, bounds and races."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

SECTOR = 32


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
    multiplications: int  # of matrix products
    faults: tuple[str, ...]


class Region:
    """The byte addresses of a tensor's elements."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.start = tensor.data_ptr()
        # The innermost dimensions without gaps are one contiguous run of bytes.
        dims = [(s * size, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
        dims = sorted((dim for dim in dims if dim[0] > 0), reverse=True)
        self.run = size
        while dims and dims[-1][0] <= self.run:
            stride, count = dims.pop()
            self.run = stride * (count - 1) + self.run
        self.dims = dims
        self.end = self.start + self.run + sum(stride * (count - 1) for stride, count in dims)

    def contains(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Which of the accesses of `size` bytes lie within elements of the tensor."""
        offset = addresses - self.start
        inside = (offset >= 0) & (addresses + size <= self.end)
        for stride, count in self.dims:
            index = np.minimum(offset // stride, count - 1)
            offset = offset - index * stride
        return inside & (offset + size <= self.run)


class AccessLog:
    """Records the loads and stores of one launch of `kernel` on `tensors`."""

    def __init__(self, kernel: str, tensors: list[Tensor]) -> None:
        self.kernel = kernel
        self.regions = [Region(tensor) for tensor in tensors if tensor.numel()]
        self.bytes = {"load": 0, "store": 0}
        self.sectors: dict[str, list[np.ndarray]] = {"load": [], "store": []}
        self.written_regions: set[int] = set()
        self.loads: list[tuple[tuple, np.ndarray, set[int]]] = []
        self.stores: list[tuple[tuple, np.ndarray]] = []
        self.atomics = self.multiplications = 0
        self.faults: dict[str, str] = {}  # the first of each kind

    def fault(self, kind: str, program: tuple, text: str) -> None:
        """Record an invalid access, once per kind."""
        self.faults.setdefault(kind, f"{self.kernel}: program {program} {text}")

    def access(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int, program: tuple
    ) -> np.ndarray:
        """Record a load or store; returns the mask without its lanes that are out of bounds."""
        addresses = pointers.astype(np.int64)
        mask = np.broadcast_to(np.asarray(mask, bool), addresses.shape)
        in_bounds, touched = np.zeros(addresses.shape, bool), set()
        for number, region in enumerate(self.regions):
            in_region = region.contains(addresses, size) & mask
            if in_region.any():
                in_bounds |= in_region
                touched.add(number)
            if in_bounds.sum() == mask.sum():
                break
        if (outside := int((mask & ~in_bounds).sum())) > 0:
            self.fault(f"outside {kind}", program, f"{kind}s {outside} elements out of bounds")
        lanes = addresses[in_bounds]
        unique = lanes if (np.diff(lanes) > 0).all() else np.unique(lanes)
        sectors = np.unique(unique // SECTOR)
        self.bytes[kind] += sectors.size * SECTOR
        self.sectors[kind].append(sectors)
        if kind == "store":
            if unique.size < lanes.size:
                self.fault("twice", program, "writes an address twice in one store")
            self.written_regions |= touched
            self.stores.append((program, unique))
        else:
            self.loads.append((program, unique, touched))
        return in_bounds

    def atomic(self, pointers: np.ndarray, mask: np.ndarray, size: int, program: tuple) -> None:
        """Record an atomic as a load and a store that take part in no race."""
        self.atomics += 1
        for records in (self.loads, self.stores):
            kind = "load" if records is self.loads else "store"
            self.access(kind, pointers, mask, size, program)
            records.pop()

    def find_races(self) -> None:
        """Record a fault if two programs access one address and at least one writes it."""
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
            index = np.minimum(np.searchsorted(written, addresses), written.size - 1)
            raced = (written[index] == addresses) & (writers[index] != number.get(program, -1))
            if raced.any():
                other = programs[writers[index[int(raced.argmax())]]]
                self.fault("read race", program, f"reads what program {other} writes")

    def summary(self, grid: tuple[int, ...]) -> Launch:
        """Check for races and total the launch."""
        self.find_races()
        distinct = {
            kind: int(np.unique(np.concatenate(sectors)).size) * SECTOR if sectors else 0
            for kind, sectors in self.sectors.items()
        }
        return Launch(
            kernel=self.kernel,
            grid=grid,
            loaded=self.bytes["load"],
            stored=self.bytes["store"],
            distinct_loaded=distinct["load"],
            distinct_stored=distinct["store"],
            atomics=self.atomics,
            multiplications=self.multiplications,
            faults=tuple(self.faults.values()),
        )
