"""Trace training steps: named ranges, most expensive operations, and host synchronisations.

    python profiling/record_trace.py [--scale 1] [--batch 64] [--steps 3] [--out runs/trace]

Traces our step at the shapes of the 0.36 B preset, its width divided by --scale, and a report of
metrics after the last one. Writes trace.json, for Chrome or ui.perfetto.dev, and summary.json; on a
GPU also memory.pickle, for pytorch.org/memory_viz. The ranges data, forward, backward, optimizer,
metrics and report are NVTX ranges too. `host_reads` counts values copied to the host, `waits` calls
of the CUDA runtime that synchronise. On a GPU forward, backward, optimizer and metrics must have
neither; on a CPU the references of the kernels read their arguments, which does not block.
`operations` counts those of torch in a step and in a report.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from bench_utils import REWARDS, ROOT, add_device, argument_parser, metadata, write_json
from our_worker import OurStep
from torch.profiler import ProfilerActivity, profile, record_function
from worker import Phases, Step

from miro.training.flops import peak_flops
from miro.training.metrics import MetricsTracker
from miro.training.metrics_log import MetricsWriter
from miro_kernels.lab.eager import FREE

READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
STEP = ("forward", "backward", "optimizer", "metrics")
RANGES = ("data", *STEP, "report")
WARMUP = 2


class Ranges(Phases):
    """Marks phases of a step as ranges without synchronising."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Mark a phase of the step in the trace."""
        on_gpu = self.device == "cuda"
        with record_function(name), torch.cuda.nvtx.range(name) if on_gpu else nullcontext():
            yield


def traced(step: Step, steps: int, report: Callable[[], Any] = lambda: None) -> Any:
    """Profile `steps` steps and a report."""
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
    """Whether an event on the host starts within one of the ranges."""
    start = event.time_range.start
    return any(r.time_range.start <= start < r.time_range.end for r in ranges)


def synchronisations(events: Sequence[Any]) -> dict[str, int]:
    """Count host reads and waits in the ranges of a step."""
    ranges = [e for e in events if e.name in STEP]
    found = Counter(
        "host_reads" if event.name in READS else "waits"
        for event in events
        if event.name in READS | WAITS and inside(event, ranges)
    )
    return {name: found[name] for name in ("host_reads", "waits")}


def operations(events: Sequence[Any], names: Sequence[str]) -> int:
    """Count torch operations in the ranges, without views and nested operations."""

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


def most_expensive(
    profiler: Any, steps: int, on_gpu: bool, count: int = 10
) -> list[dict[str, Any]]:
    """The operations, or kernels on a GPU, with the most self time, per step."""
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [row for row in profiler.key_averages() if row.key not in RANGES]
    rows = sorted(rows, key=lambda row: -getattr(row, attribute))[:count]
    return [
        {
            "name": row.key,
            "milliseconds": getattr(row, attribute) / 1e3 / steps,
            "calls": row.count / steps,
        }
        for row in rows
    ]


def idle_share(events: Sequence[Any]) -> float | None:
    """Share of the time between the first and the last kernel in which no kernel runs."""
    kernels = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and e.name not in RANGES
    )
    if not kernels:
        return None
    busy, last_end = 0.0, kernels[0][0]
    for start, end in kernels:
        busy += max(0.0, end - max(start, last_end))
        last_end = max(last_end, end)
    return 1 - busy / (last_end - kernels[0][0])


def main() -> int:
    """Record a trace of training steps, and write it."""
    parser = argument_parser(__doc__, ROOT / "runs" / "trace")
    parser.add_argument("--scale", type=int, default=1, help="divides the width")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--text", type=int, default=65, help="tokens per text")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--kernels", default="auto")
    add_device(parser)
    args = parser.parse_args()
    settings = {
        "scale": args.scale, "batch": args.batch, "lengths": [args.text] * args.batch,
        "precision": args.precision, "compiled": args.compiled, "kernels": args.kernels,
        "device": args.device,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.memory._record_memory_history()
    step = OurStep(settings)
    writer = MetricsWriter(args.out / "metrics.jsonl", args.out / "tensorboard", 0)
    rewards = [f"reward {number}" for number in range(REWARDS)]
    metrics = step.metrics = MetricsTracker(
        step.engine, writer, lambda progress: None, lambda images: [], 0, rewards=rewards,
        peak=peak_flops(step.engine.device, args.precision),
    )  # fmt: skip
    images = args.batch * (WARMUP + args.steps)
    profiler = traced(step, args.steps, report=lambda: metrics.log(images, images))
    writer.close()
    if on_gpu:
        torch.cuda.memory._dump_snapshot(str(args.out / "memory.pickle"))
    events = list(profiler.events())
    profiler.export_chrome_trace(str(args.out / "trace.json"))
    idle = idle_share(events)
    per_step = operations(events, STEP) / args.steps
    per_report = operations(events, ["report"])
    interval = step.config.report_every // step.config.batch
    counts = {"step": per_step, "metrics": operations(events, ["metrics"]), "report": per_report}
    record = {
        **metadata(args.device),
        "settings": settings,
        "counted": synchronisations(events) | {"operations": counts},
        "reporting": per_report / (interval * per_step),
        "most_expensive": most_expensive(profiler, args.steps, on_gpu),
        "device_idle": idle,
    }
    for row in record["most_expensive"]:
        print(f"{row['milliseconds']:10.2f} ms per step {row['calls']:8.1f} x  {row['name'][:70]}")
    print("no GPU" if idle is None else f"the GPU is idle {idle:.1%} of the time")
    print(", ".join(f"{name}: {count}" for name, count in record["counted"].items()))
    print(f"a report every {interval} steps is {record['reporting']:.3%} of the operations")
    write_json(record, args.out / "summary.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
