"""A trace of training steps: named ranges, the costliest operations, reads that stop the host.

    python profiling/record_trace.py [--scale 1] [--batch 64] [--steps 3] [--out runs/trace]

Our step at the 0.36 B preset's shapes, its width divided by `scale`, and a report after the last
one. Writes trace.json, for Chrome or ui.perfetto.dev, and summary.json; on a GPU memory.pickle too,
for pytorch.org/memory_viz. Ranges are data, forward, backward, optimizer, meter and report, which
Nsight Systems shows as well (NVTX). What keeps the host waiting is counted: `host_reads` are values
taken from a device, `waits` the runtime's calls that return when the device is done. On a GPU
neither may occur in a step, of which data, loss and report are no part; on a CPU the references of
the kernels read their arguments, which stops nothing (tests/miro/test_batch_plan.py holds all
else to none). `operations` are torch's, of a step and of the report, with what those are a share of
between two reports of the preset.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from measured import machine, write
from our_worker import REWARDS, OurStep
from torch.profiler import ProfilerActivity, profile, record_function
from worker import Phases, Step

from miro.training.flops import peak_flops
from miro.training.metrics import MetricsTracker
from miro.training.metrics_log import MetricsWriter
from miro_kernels.lab.eager import FREE

ROOT = Path(__file__).parent.parent
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
STEP = ("forward", "backward", "optimizer", "meter")
RANGES = ("data", *STEP, "report")
WARMUP = 2


class Ranges(Phases):
    """Names the parts of a step and waits for nothing."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        on_gpu = self.device == "cuda"
        with record_function(name), torch.cuda.nvtx.range(name) if on_gpu else nullcontext():
            yield


def traced(step: Step, steps: int, report: Callable[[], None] = lambda: None) -> Any:
    """The profiler after `steps` steps and a report of them."""
    device = step.settings["device"]
    for number in range(WARMUP):
        step.run(number, Ranges(device))
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities, acc_events=True) as profiler:
        for number in range(WARMUP, WARMUP + steps):
            step.run(number, Ranges(device))
        if device == "cuda":
            torch.cuda.synchronize()
        with Ranges(device)("report"):
            report()
    return profiler


def inside(event: Any, ranges: Sequence[Any]) -> bool:
    """Whether an event of the host began within one of the ranges."""
    start = event.time_range.start
    return any(r.time_range.start <= start < r.time_range.end for r in ranges)


def stops(events: Sequence[Any]) -> dict[str, int]:
    """How often the host waited in the ranges of a step."""
    ranges = [e for e in events if e.name in STEP]
    found = Counter(
        "host_reads" if event.name in READS else "waits"
        for event in events
        if event.name in READS | WAITS and inside(event, ranges)
    )
    return {name: found[name] for name in ("host_reads", "waits")}


def operations(events: Sequence[Any], names: Sequence[str]) -> int:
    """Torch's operations in the ranges of these names: no views, and none that others call."""

    def of_torch(event: Any) -> bool:
        library, _, name = event.name.partition("::")
        return library in ("aten", "miro") and name not in FREE

    ranges = [e for e in events if e.name in names]
    return sum(
        of_torch(e) and inside(e, ranges)
        for e in events
        if e.device_type == torch.autograd.DeviceType.CPU
        and not (e.cpu_parent and of_torch(e.cpu_parent))
    )


def costliest(profiler: Any, steps: int, on_gpu: bool, count: int = 10) -> list[dict[str, Any]]:
    """The operations, or the device's kernels, with most time of their own, per step."""
    cost = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [row for row in profiler.key_averages() if row.key not in RANGES]
    rows = sorted(rows, key=lambda row: -getattr(row, cost))[:count]
    return [
        {
            "name": row.key,
            "milliseconds": getattr(row, cost) / 1e3 / steps,
            "calls": row.count / steps,
        }
        for row in rows
    ]


def idle_share(events: Sequence[Any]) -> float | None:
    """Share of the time, from the first kernel to the last, in which the device ran none."""
    kernels = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and e.name not in RANGES
    )
    if not kernels:
        return None
    busy, reached = 0.0, kernels[0][0]
    for start, end in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - kernels[0][0])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=int, default=1, help="divides the width")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--text", type=int, default=65, help="tokens of every text")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "trace")
    given = parser.parse_args()
    settings = {
        "scale": given.scale, "batch": given.batch, "lengths": [given.text] * given.batch,
        "precision": given.precision, "compiled": given.compiled, "kernels": given.kernels,
        "device": given.device,
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    on_gpu = given.device == "cuda"
    if on_gpu:
        torch.cuda.memory._record_memory_history()
    step = OurStep(settings)
    metrics = MetricsWriter(given.out / "metrics.jsonl", given.out / "tensorboard", 0)
    rewards = [f"reward {number}" for number in range(REWARDS)]
    step.meter = MetricsTracker(
        step.engine, metrics, lambda progress: None, lambda images: [], 0, rewards=rewards,
        peak=peak_flops(step.engine.device, given.precision),
    )  # fmt: skip
    images = given.batch * (WARMUP + given.steps)
    profiler = traced(step, given.steps, report=lambda: step.meter.log(images, images))
    metrics.close()
    if on_gpu:
        torch.cuda.memory._dump_snapshot(str(given.out / "memory.pickle"))
    events = list(profiler.events())
    profiler.export_chrome_trace(str(given.out / "trace.json"))
    idle = idle_share(events)
    a_step = operations(events, STEP) / given.steps
    a_report, every = operations(events, ["report"]), step.config.report_every // step.config.batch
    counts = {"step": a_step, "meter": operations(events, ["meter"]), "report": a_report}
    record = {
        **machine(given.device),
        "settings": settings,
        "counted": stops(events) | {"operations": counts},
        "reporting": a_report / (every * a_step),
        "costliest": costliest(profiler, given.steps, on_gpu),
        "device_idle": idle,
    }
    for row in record["costliest"]:
        print(f"{row['milliseconds']:10.2f} ms a step {row['calls']:8.1f} x  {row['name'][:70]}")
    print(f"the device idles {idle:.1%}" if idle is not None else "no device, so none idles")
    print(", ".join(f"{name}: {count}" for name, count in record["counted"].items()))
    print(f"a report every {every} steps is {record['reporting']:.3%} of the operations")
    write(record, given.out / "summary.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
