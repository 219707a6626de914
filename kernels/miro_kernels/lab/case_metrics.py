"""Measures a case: what it moves, how far it is from the oracle, what it compiles to.

Interpreted cases run on fewer samples than the preset's batch, which would take minutes. Where a
kernel shapes its programs by the size of the batch, its table entry is scaled along, so that every
program does what it does in the whole batch, and a byte ratio is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from miro_kernels import backend, tiles
from miro_kernels.attention import op, reference
from miro_kernels.lab import testing
from miro_kernels.lab.cases import BATCH, Arguments, Case, Make
from miro_kernels.lab.eager import EagerBytes, eager_bytes
from miro_kernels.lab.inductor import generate
from miro_kernels.lab.resources import Compiled, capture
from miro_kernels.lab.traffic import count


@dataclass(frozen=True)
class Moved:
    """Bytes of one direction of a case."""

    kernels: int  # sectors of every instruction, and the torch operations of the launcher
    distinct: int  # the same with every sector of a launch counted once
    eager: int
    least: int


def leaves_of(arguments: Arguments) -> list[Tensor]:
    return [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]


def outputs_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def gradients_for(outputs: list[Tensor]) -> list[Tensor]:
    return [testing.random_gradient(output.detach(), n) for n, output in enumerate(outputs)]


@contextmanager
def shaped_for_whole_batch(samples: int) -> Iterator[None]:
    """Kernels of `samples` samples get programs like those of the preset's batch."""
    scaled = {
        family: {
            kernel: {**tile, "programs": max(1, tile["programs"] * samples // BATCH)}
            for kernel, tile in kernels.items()
            if "programs" in tile
        }
        for family, kernels in tiles.TILES.items()
    }
    with mock.patch.object(tiles, "_replaced", scaled):
        yield


@contextmanager
def eager_as_on_a_gpu() -> Iterator[None]:
    """References compute attention in the arguments' dtype, and not as a CPU does."""
    with (
        backend.use_backend("torch"),
        mock.patch.object(reference, "widen", lambda tensor: tensor),
        mock.patch.object(op, "CPU_FLASH_MIN_TOKENS", sys.maxsize),
    ):
        yield


def bytes_moved(case: Case, dtype: torch.dtype) -> dict[str, Moved]:
    """The bytes of each direction, in the interpreter."""
    *few, batch = case.batches
    found = counted(case, dtype, batch)
    if not few:
        return found
    # A fixed part and one that grows with the samples: carried on to the whole batch.
    before, steps = counted(case, dtype, few[0]), (BATCH - batch) / (batch - few[0])
    least = least_of_whole_batch(case, dtype)

    def carried(direction: str, name: str) -> int:
        last = getattr(found[direction], name)
        return round(last + steps * (last - getattr(before[direction], name)))

    return {
        direction: Moved(
            *(carried(direction, name) for name in ("kernels", "distinct", "eager")),
            least=least[direction],
        )
        for direction in found
    }


def counted(case: Case, dtype: torch.dtype, batch: int) -> dict[str, Moved]:
    """The bytes of each direction for a batch, its programs shaped as for a whole one."""
    arguments = case.arguments(Make("cpu", dtype), batch)
    leaves = leaves_of(arguments)
    with shaped_for_whole_batch(batch), backend.use_backend("triton"):
        run = case.prepare(arguments)
        with count() as forward, EagerBytes() as beside:
            result = run()
        found = {"forward": (forward, beside)}
        outputs = [] if result is None else outputs_of(result)
        if "backward" in case.directions:
            gradients = gradients_for(outputs)
            with count() as backward, EagerBytes() as beside:
                torch.autograd.grad(outputs, leaves, gradients)
            found["backward"] = (backward, beside)
    eager = {}
    with eager_as_on_a_gpu():
        run = case.prepare(arguments)
        results: list[Tensor] = []
        eager["forward"] = eager_bytes(lambda: results.extend(outputs_of(run())))
        if "backward" in case.directions:
            gradients = gradients_for(results)
            eager["backward"] = eager_bytes(lambda: torch.autograd.grad(results, leaves, gradients))
    least = case.least(arguments, outputs)
    return {
        direction: Moved(
            kernels=traffic.bytes + torchs.bytes,
            distinct=traffic.distinct + torchs.bytes,
            eager=eager[direction],
            least=least[direction],
        )
        for direction, (traffic, torchs) in found.items()
    }


def errors(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """The largest error over eager's of each direction's results."""
    # Two samples show what many do, and the oracle takes its time.
    arguments = case.arguments(Make(device, dtype), min(case.batches[-1], 2))

    def kernel(**given: Any) -> Any:
        with backend.use_backend("triton"):
            return case.function(**given)

    compared = testing.compare(kernel, case.reference, arguments)
    worst: dict[str, float] = dict.fromkeys(case.directions, 0.0)
    for comparison in compared:
        direction = "backward" if comparison.name.startswith("d ") else "forward"
        worst[direction] = max(worst[direction], comparison.over_eager)
    return worst


def compiled(case: Case, dtype: torch.dtype, target: str) -> dict[str, list[Compiled]]:
    """The kernels of each direction at the preset's whole batch, for `target`."""
    arguments = case.arguments(Make("cpu", dtype, filled=False), BATCH)
    run = case.prepare(arguments) if case.prepared else None
    with capture(target) as forward:
        result = (run or case.prepare(arguments))()
    found = {"forward": forward}
    if "backward" in case.directions:
        outputs = outputs_of(result)
        with capture(target) as backward:
            gradients = [torch.empty_like(output) for output in outputs]
            torch.autograd.grad(outputs, leaves_of(arguments), gradients)
        found["backward"] = backward
    return found


def least_of_whole_batch(case: Case, dtype: torch.dtype) -> dict[str, int]:
    arguments = case.arguments(Make("cpu", dtype, filled=False), BATCH)
    with FakeTensorMode() as mode:
        fakes = {
            n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()
        }
        outputs = outputs_of(case.reference(**fakes))
    return case.least(arguments, outputs)


def inductor_bytes(case: Case, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Of each direction: the bytes of what Inductor would generate, and the least."""
    arguments = case.arguments(Make("cpu", dtype, filled=False), BATCH)
    with eager_as_on_a_gpu():
        forward, backward = generate(case.reference, arguments)
    least = least_of_whole_batch(case, dtype)
    found = {"forward": (forward.bytes, least["forward"])}
    if backward is not None:
        found["backward"] = (backward.bytes, least["backward"])
    return found
