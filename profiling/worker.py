"""What the processes that bench_step.py measures have in common. Imports torch alone.

A worker makes its step, says so in one line of JSON, and then takes as many steps as each line of
its input says, answering with the seconds of each, by phase. Between lines it does nothing, so that
several workers can lie side by side and be measured in turn.
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

FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FOR_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Torch counts attention on a GPU, and on a CPU as nothing.
@register_flop_formula(FOR_CPU)
def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **others: Any) -> int:
    return sdpa_flop_count(q, k, v)


@register_flop_formula(FOR_CPU_BACKWARD)
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **others: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


class Phases:
    """Seconds of the parts of a step; on a GPU each waits for the device."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, dict[str, float]()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start


class Step(ABC):
    """A training step that can be measured."""

    settings: dict[str, Any]
    parameters: int

    @abstractmethod
    def run(self, number: int, phases: Phases) -> Tensor:
        """One optimizer step on the batch of that number; its loss."""

    @abstractmethod
    def useful(self) -> Tensor:
        """The least forward pass that trains: once through the network, nothing recomputed."""


def resident(line: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since `forget_peak`."""
    with open("/proc/self/status") as file:
        (found,) = (row for row in file if row.startswith(f"{line}:"))
    return 1024 * int(found.split()[1])


def forget_peak(device: str) -> None:
    """Begin `peak_bytes` anew. What compiling left on the heap, free, is given back before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak_bytes(device: str) -> int:
    """The most memory since `forget_peak`: of the device, or of the process on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def counted(step: Step) -> dict[str, float]:
    """FLOPs of an image, 2 for a multiply and an add: what a step executes, and what it needs.

    Useful are three times a forward pass. Counted on the step as it is when nothing is compiled,
    which changes no product.
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
    """What the process takes before there is a step: libraries and, if asked for, the compiler."""
    if settings["device"] == "cuda":
        return 0  # `peak_bytes` is of the device
    if settings["compiled"]:
        torch.compile(torch.neg)(torch.ones(2))
    forget_peak(settings["device"])
    return resident("VmRSS")


def serve(make: Callable[[dict[str, Any]], Step]) -> None:
    """Make the step of the settings on the command line; answer standard input until it ends."""
    settings = json.loads(sys.argv[1])
    if settings.get("threads"):
        torch.set_num_threads(settings["threads"])
    libraries = library_bytes(settings)
    step = make(settings)
    counts = {} if settings["compiled"] else counted(step)
    if settings.get("counted_only"):
        _say({"counted": counts})
        return
    start = time.perf_counter()
    for number in range(settings["warmup"]):
        step.run(number, Phases(settings["device"]))
    seconds = time.perf_counter() - start
    _say({"counted": counts, "start_seconds": seconds, "library_bytes": libraries})
    numbers = itertools.count(settings["warmup"])
    for line in sys.stdin:
        forget_peak(settings["device"])
        rows = []
        for number in itertools.islice(numbers, int(line)):
            phases = Phases(settings["device"])
            loss = step.run(number, phases)
            if not loss.isfinite():
                raise FloatingPointError(f"the loss of step {number} is {float(loss)}")
            rows.append(phases.seconds)
        _say({"steps": rows, "peak_bytes": peak_bytes(settings["device"])})


def _say(answer: dict[str, Any]) -> None:
    print("answer " + json.dumps(answer), flush=True)
