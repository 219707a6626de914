"""Protocol and memory counters of the worker processes of bench_step.py. Imports only torch.

A worker builds its training step and writes one line of JSON. For each line of its input it runs
that many steps and writes their seconds by phase. In between it is idle, so that several workers
can be measured in turn.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# FlopCounterMode has no formula for attention on a CPU.
@register_flop_formula(_CPU_ATTENTION)
def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **others: Any) -> int:
    return sdpa_flop_count(q, k, v)


@register_flop_formula(_CPU_ATTENTION_BACKWARD)
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **others: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


class Phases:
    """Seconds of the phases of a step, each synchronised on a GPU."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, dict[str, float]()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the context to the phase `name`."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start


class Step(ABC):
    """A training step to measure."""

    settings: dict[str, Any]
    parameters: int

    @abstractmethod
    def run(self, number: int, phases: Phases) -> Tensor:
        """Run one optimizer step on batch `number` and return its loss."""

    @abstractmethod
    def useful(self) -> Tensor:
        """Run the minimal forward pass: the network once, nothing recomputed."""


def resident_bytes(field: str) -> int:
    """Resident memory of this process: VmRSS now, VmHWM the peak since `reset_peak`."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def reset_peak(device: str) -> None:
    """Reset `peak_bytes`, after malloc_trim returned free heap to the system."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak_bytes(device: str) -> int:
    """Peak memory since `reset_peak`: of the GPU, or of the process on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")


def count_flops(step: Step) -> dict[str, float]:
    """Count parameters and FLOPs per image, 2 per multiply-add, of an eager step.

    Useful FLOPs are three times those of `Step.useful`.
    """
    batch, device = step.settings["batch"], step.settings["device"]
    with FlopCounterMode(display=False) as executed:
        step.run(0, Phases(device))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        step.useful()
    return {
        "executed_flops": executed.get_total_flops() / batch,
        "useful_flops": 3 * forward.get_total_flops() / batch,
        "parameters": step.parameters,
    }


def library_bytes(settings: dict[str, Any]) -> int:
    """Memory of the process before the step is built: libraries and, if compiled, the compiler."""
    if settings["device"] == "cuda":
        return 0  # `peak_bytes` is that of the GPU
    if settings["compiled"]:
        torch.compile(torch.neg)(torch.ones(2))
    reset_peak(settings["device"])
    return resident_bytes("VmRSS")


def serve(build: Callable[[dict[str, Any]], Step]) -> None:
    """Build the step of the settings in sys.argv[1], then serve standard input until it ends."""
    settings = json.loads(sys.argv[1])
    if settings.get("threads"):
        torch.set_num_threads(settings["threads"])
    libraries = library_bytes(settings)
    step = build(settings)
    counts = {} if settings["compiled"] else count_flops(step)
    if settings.get("counted_only"):
        _answer({"counted": counts})
        return
    start = time.perf_counter()
    for number in range(settings["warmup"]):
        step.run(number, Phases(settings["device"]))
    seconds = time.perf_counter() - start
    _answer({"counted": counts, "start_seconds": seconds, "library_bytes": libraries})
    numbers = itertools.count(settings["warmup"])
    for line in sys.stdin:
        reset_peak(settings["device"])
        rows = []
        for number in itertools.islice(numbers, int(line)):
            phases = Phases(settings["device"])
            loss = step.run(number, phases)
            if not loss.isfinite():
                raise FloatingPointError(f"the loss of step {number} is {float(loss)}")
            rows.append(phases.seconds)
        _answer({"steps": rows, "peak_bytes": peak_bytes(settings["device"])})


def _answer(answer: dict[str, Any]) -> None:
    print("answer " + json.dumps(answer), flush=True)
