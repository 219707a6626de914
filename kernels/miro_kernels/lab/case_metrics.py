"""Bytes, errors and compiled resources of a case.

Interpreting the preset's whole batch would take minutes, so fewer samples are interpreted. A kernel
that chooses tokens per program by the batch size gets its `programs` setting scaled along, so that
every program does the work it does in the whole batch and byte ratios are the same.
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

from miro_kernels import backend, tiles
from miro_kernels.attention import op, reference
from miro_kernels.lab import testing
from miro_kernels.lab.cases import BATCH, Arguments, Case, Make
from miro_kernels.lab.eager import EagerBytes, eager_bytes
from miro_kernels.lab.inductor import generate
from miro_kernels.lab.private_torch import FakeTensorMode
from miro_kernels.lab.resources import Compiled, capture
from miro_kernels.lab.testing import outputs_of
from miro_kernels.lab.traffic import count


@dataclass(frozen=True)
class ByteCounts:
    """Bytes moved by one direction of a case."""

    kernels: int  # sectors of every access, and the launcher's torch operations
    distinct: int  # the same, with each sector of a launch counted once
    eager: int
    least: int


def leaves_of(arguments: Arguments) -> list[Tensor]:
    """The tensors among the arguments that require a gradient."""
    return [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]


def gradients_for(outputs: list[Tensor]) -> list[Tensor]:
    """A random gradient for each output."""
    return [testing.random_gradient(output.detach(), n) for n, output in enumerate(outputs)]


@contextmanager
def _programs_of_whole_batch(samples: int) -> Iterator[None]:
    """Launches of `samples` samples have programs like those of the preset's batch."""
    scaled = {
        family: {
            kernel: {**tile, "programs": max(1, tile["programs"] * samples // BATCH)}
            for kernel, tile in kernels.items()
            if "programs" in tile
        }
        for family, kernels in tiles.TILES.items()
    }
    with mock.patch.object(tiles, "_overrides", scaled):
        yield


@contextmanager
def eager_as_on_a_gpu() -> Iterator[None]:
    """References on CPU tensors compute attention as on a GPU: in the arguments' dtype, by SDPA."""
    with (
        backend.use_backend("torch"),
        mock.patch.object(reference, "widen", lambda tensor: tensor),
        mock.patch.object(op, "CPU_FLASH_MIN_TOKENS", sys.maxsize),
    ):
        yield


def bytes_moved(case: Case, dtype: torch.dtype) -> dict[str, ByteCounts]:
    """The bytes of each direction, from the interpreter.

    For a case with two batch sizes, a linear fit extrapolates to the whole batch.
    """
    *smaller, batch = case.batches
    counts = counted(case, dtype, batch)
    if not smaller:
        return counts
    before, steps = counted(case, dtype, smaller[0]), (BATCH - batch) / (batch - smaller[0])
    least = _least_of_whole_batch(case, dtype)

    def extrapolated(direction: str, name: str) -> int:
        last = getattr(counts[direction], name)
        return round(last + steps * (last - getattr(before[direction], name)))

    return {
        direction: ByteCounts(
            *(extrapolated(direction, name) for name in ("kernels", "distinct", "eager")),
            least=least[direction],
        )
        for direction in counts
    }


def counted(case: Case, dtype: torch.dtype, batch: int) -> dict[str, ByteCounts]:
    """The bytes of each direction at this batch size, with the whole batch's programs."""
    arguments = case.arguments(Make("cpu", dtype), batch)
    leaves = leaves_of(arguments)
    with _programs_of_whole_batch(batch), backend.use_backend("triton"):
        run = case.prepare(arguments)
        with count() as forward, EagerBytes() as launcher:
            result = run()
        traffics = {"forward": (forward, launcher)}
        outputs = [] if result is None else outputs_of(result)
        if "backward" in case.directions:
            gradients = gradients_for(outputs)
            with count() as backward, EagerBytes() as launcher:
                torch.autograd.grad(outputs, leaves, gradients)
            traffics["backward"] = (backward, launcher)
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
        direction: ByteCounts(
            kernels=traffic.bytes + launcher.bytes,
            distinct=traffic.distinct + launcher.bytes,
            eager=eager[direction],
            least=least[direction],
        )
        for direction, (traffic, launcher) in traffics.items()
    }


def errors(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """The kernel's largest error over eager's, by direction; of at most two samples."""
    arguments = case.arguments(Make(device, dtype), min(case.batches[-1], 2))

    def kernel(**arguments: Any) -> Any:
        with backend.use_backend("triton"):
            return case.function(**arguments)

    largest: dict[str, float] = dict.fromkeys(case.directions, 0.0)
    for comparison in testing.compare(kernel, case.reference, arguments):
        direction = "backward" if comparison.name.startswith("d ") else "forward"
        largest[direction] = max(largest[direction], comparison.over_eager)
    return largest


def compiled(case: Case, dtype: torch.dtype, target: str) -> dict[str, list[Compiled]]:
    """The kernels of each direction at the preset's batch, compiled for `target`."""
    arguments = case.arguments(Make("cpu", dtype, filled=False), BATCH)
    run = case.prepare(arguments) if case.prepared else None
    with capture(target) as forward:
        result = (run or case.prepare(arguments))()
    kernels = {"forward": forward}
    if "backward" in case.directions:
        outputs = outputs_of(result)
        with capture(target) as backward:
            gradients = [torch.empty_like(output) for output in outputs]
            torch.autograd.grad(outputs, leaves_of(arguments), gradients)
        kernels["backward"] = backward
    return kernels


def _least_of_whole_batch(case: Case, dtype: torch.dtype) -> dict[str, int]:
    arguments = case.arguments(Make("cpu", dtype, filled=False), BATCH)
    with FakeTensorMode() as mode:
        fakes = {
            n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()
        }
        outputs = outputs_of(case.reference(**fakes))
    return case.least(arguments, outputs)


def inductor_bytes(case: Case, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """(bytes of what Inductor would generate, least bytes) of each direction."""
    arguments = case.arguments(Make("cpu", dtype, filled=False), BATCH)
    with eager_as_on_a_gpu():
        forward, backward = generate(case.reference, arguments)
    least = _least_of_whole_batch(case, dtype)
    moved = {"forward": (forward.bytes, least["forward"])}
    if backward is not None:
        moved["backward"] = (backward.bytes, least["backward"])
    return moved
