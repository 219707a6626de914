"""Test and time the kernels on a GPU, in under half an hour.

    python profiling/gpu_check.py [--out profiling/results] [--minutes 28]

First the kernel tests run on the device; if one fails, nothing is timed. Then each op at the shapes
of the 0.36 B preset: our kernels, eager torch, torch.compile, cuDNN for attention without text, and
flash-attn and Liger if installed. Times are medians (20th to 80th percentile) of single calls
between CUDA events, with the L2 cache flushed and the device busy before each, so that launch
latency is hidden. Rates are of the minimal bytes, or of the FLOPs of attention, relative to the
measured rates of a copy and a matrix product. Last, whole training steps.

Exits 2 without a GPU, 1 if a test fails. Writes gpu-DEVICE-DATE.json and .md.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import triton
from bench_utils import (
    ROOT,
    argument_parser,
    commit,
    metadata,
    output_of,
    quantiles,
    write_json,
)
from gpu_steps import STEPS, steps_table, training_steps
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from miro_kernels import use_backend
from miro_kernels.lab.case_metrics import gradients_for, leaves_of, outputs_of
from miro_kernels.lab.cases import BATCH, CASES, Arguments, Case, Make

DEVICE = "cuda"
DTYPE = torch.bfloat16
WITHOUT_TEXT = "attention without text"
VARIANTS = ("kernels", "eager", "torch.compile", "cuDNN", "flash-attn", "Liger")

NOT_COMPILED = (InductorError, TorchDynamoException)

# Timing runs backward repeatedly on the tensors saved by one forward.
torch._functorch.config.donated_buffer = False

Run = Callable[[], Any]


class Clock:
    """Times single calls on the GPU."""

    def __init__(self, repeats: int = 50) -> None:
        self.repeats = repeats
        self.l2_flush = torch.empty(
            512 * 2**20, dtype=torch.int8, device=DEVICE
        )  # more than any L2

    def __call__(self, run: Run) -> dict[str, float]:
        """Milliseconds: median, 20th and 80th percentile."""
        for _ in range(5):
            run()
        pairs = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.l2_flush.zero_()
            torch.cuda._sleep(1_000_000)  # 0.5 ms, in which the host runs ahead
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return quantiles([start.elapsed_time(end) for start, end in pairs])


def peaks(clock: Clock) -> dict[str, float]:
    """Measured GB/s of a copy and TFLOP/s of a matrix product."""
    source = torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, dtype=DTYPE, device=DEVICE)
    copied = clock(lambda: target.copy_(source))["median"]
    multiplied = clock(lambda: matrix @ matrix)["median"]
    return {
        "gigabytes": 2 * source.numel() / copied / 1e6,
        "teraflops": 2 * 8192**3 / multiplied / 1e9,
    }


@dataclass(frozen=True)
class Variant:
    """An implementation of a case, and the tensors to differentiate."""

    name: str
    run: Run
    leaves: list[Tensor]


def with_backend(name: str, run: Run) -> Run:
    """The call with a backend of the kernels."""

    def wrapped() -> Any:
        with use_backend(name):
            return run()

    return wrapped


def variants(case: Case, inputs: Arguments, skipped: list[str]) -> Iterator[Variant]:
    """All available implementations; others are added to `skipped` with the reason."""
    leaves = leaves_of(inputs)
    yield Variant("kernels", with_backend("triton", case.prepare(inputs)), leaves)
    yield Variant("eager", with_backend("torch", case.prepare(inputs)), leaves)
    compiled = torch.compile(case.reference)
    yield Variant("torch.compile", lambda: compiled(**inputs), leaves)
    if case.op == WITHOUT_TEXT:
        yield Variant("cuDNN", cudnn_attention(inputs), leaves)
        yield Variant("flash-attn", with_backend("flash_attn", case.prepare(inputs)), leaves)
    if case.op == "swiglu":
        try:
            swiglu = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        except ImportError as error:
            skipped.append(f"{case.op}, Liger: {error}")
            return
        # It takes separate halves; the split is not timed.
        halves = [h.detach().contiguous().requires_grad_() for h in inputs["packed"].chunk(2, -1)]
        yield Variant("Liger", lambda: swiglu.apply(*halves), halves)


def cudnn_attention(inputs: Arguments) -> Run:
    """Attention of image tokens by cuDNN, in the layout of the inputs."""

    def run() -> Tensor:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def time_case(case: Case, clock: Clock, skipped: list[str]) -> list[dict[str, Any]]:
    """Rows by variant and direction."""
    inputs = case.arguments(Make(DEVICE, DTYPE), BATCH)
    with use_backend("triton"), FlopCounterMode(display=False) as counted:
        outputs = outputs_of(case.function(**inputs))
    # Attention has 5 matrix products in backward for 2 in forward.
    total = counted.get_total_flops()
    flops = {"forward": total, "backward": total * 2.5}
    least = case.least(inputs, outputs)
    rows = []
    for variant in variants(case, inputs, skipped):
        try:
            for direction, run in directions_of(case, variant).items():
                row = {"op": case.op, "direction": direction, "variant": variant.name}
                row |= {"bytes": least[direction], "flops": flops[direction]}
                rows.append(row | clock(run))
        except (*NOT_COMPILED, ValueError, RuntimeError) as error:
            # Others may fail to import or compile.
            if variant.name == "kernels":
                raise
            skipped.append(f"{case.op}, {variant.name}: {str(error).strip().splitlines()[0]}")
    torch.cuda.empty_cache()
    return rows


def directions_of(case: Case, variant: Variant) -> dict[str, Run]:
    """Calls of forward and, if the case has one, backward."""
    if "backward" not in case.directions:
        return {"forward": variant.run}
    results = outputs_of(variant.run())
    backward = partial(
        torch.autograd.grad, results, variant.leaves, gradients_for(results),
        retain_graph=True, allow_unused=True,
    )  # fmt: skip
    return {"forward": variant.run, "backward": backward}


def without_text(case: Case) -> Case:
    """The attention case without text tokens, which flash-attn supports."""

    def arguments(make: Make, batch: int) -> Arguments:
        inputs = case.arguments(make, batch)
        empty = {name: inputs[name].detach()[:0].requires_grad_() for name in ("text_k", "text_v")}
        offsets = torch.zeros_like(inputs["text_offsets"])
        return inputs | empty | {"text_offsets": offsets, "longest_text": 0}

    return replace(case, op=WITHOUT_TEXT, arguments=arguments)


def run_tests(timeout: float) -> tuple[bool, str]:
    """Run the kernel tests; whether they pass, and the last line of pytest."""
    command = [sys.executable, "-m", "pytest", "tests/kernels/interpret", "--maxfail=20"]
    if importlib.util.find_spec("xdist"):
        # Compilation takes most of the time, one core per worker.
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False, f"the tests exceeded {timeout / 60:.0f} minutes"
    lines = found.stdout.strip().splitlines() or found.stderr.strip().splitlines()
    if found.returncode:
        print(found.stdout[-6000:], found.stderr[-2000:], sep="\n")
    return found.returncode == 0, lines[-1]


def share(row: dict[str, Any], peak: dict[str, float]) -> str:
    """Rate of a row and its share of the peak, in FLOPs if it has any, otherwise in bytes."""
    if row["flops"]:
        rate = row["flops"] / row["median"] / 1e9
        return f"{rate:.0f} TFLOP/s, {rate / peak['teraflops']:.0%}"
    rate = row["bytes"] / row["median"] / 1e6
    return f"{rate:.0f} GB/s, {rate / peak['gigabytes']:.0%}"


def summary(record: dict[str, Any]) -> str:
    """Format the record as Markdown."""
    peak = record["peaks"]
    rows = {(r["op"], r["direction"], r["variant"]): r for r in record["rows"]}
    lines = [
        f"# Kernels on {record['device']}\n",
        f"{record['date']}, commit {record['commit']}, torch {record['torch']}, triton "
        f"{record['triton']}, driver and clocks: {record['smi']}. Measured peaks: "
        f"{peak['gigabytes']:.0f} GB/s copying, {peak['teraflops']:.0f} TFLOP/s in bf16.",
        f"\nTests on the device: {record['tests']}.",
        f"\nBatch {BATCH}, bf16, microseconds (20th to 80th percentile); rates are of the minimal "
        "bytes, or of the FLOPs of attention, and shares are of the measured peaks.\n",
        "| op | direction | " + " | ".join(VARIANTS) + " | rate | fastest other / kernels |",
        "|---" * (len(VARIANTS) + 4) + "|",
    ]
    for op, direction in dict.fromkeys((r["op"], r["direction"]) for r in record["rows"]):
        found = {name: rows.get((op, direction, name)) for name in VARIANTS}
        cells = [
            f"{r['median'] * 1e3:.0f} ({r['p20'] * 1e3:.0f}-{r['p80'] * 1e3:.0f})" if r else ""
            for r in found.values()
        ]
        ours = rows[op, direction, "kernels"]
        best = min(r["median"] for n, r in found.items() if r and n != "kernels")
        ratio = f"{best / ours['median']:.2f}"
        lines.append(f"| {' | '.join([op, direction, *cells, share(ours, peak), ratio])} |")
    if record["steps"]:
        lines += steps_table(record["steps"])
    skipped = [f"- {reason}" for reason in record["skipped"]] or ["nothing"]
    return "\n".join([*lines, "\nSkipped:\n", *skipped]) + "\n"


def write_results(record: dict[str, Any], folder: Path) -> None:
    """Write the results so far, in case the run is interrupted."""
    stem = f"gpu-{record['device'].replace(' ', '-')}-{record['date']}"
    write_json(record, folder / f"{stem}.json")
    (folder / f"{stem}.md").write_text(summary(record))


def main() -> int:
    """Run the tests and benchmarks of the kernels on a GPU, and write the result."""
    parser = argument_parser(__doc__)
    parser.add_argument("--commit", default=commit(), help="recorded, if this is no git checkout")
    parser.add_argument("--minutes", type=float, default=28, help="start nothing after these")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: this machine has no GPU that torch can use; nothing was checked.")
        print("Without a GPU, run: make test, python profiling/kernel_report.py")
        return 2
    end = time.monotonic() + 60 * args.minutes
    passed, last_line = run_tests(60 * args.minutes)
    print(last_line)
    if not passed:
        print("gpu-check: kernel tests fail on this device; nothing was timed")
        return 1
    smi = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    clock, skipped = Clock(), []
    record: dict[str, Any] = {
        **metadata(DEVICE),
        "commit": args.commit,
        "triton": triton.__version__,
        "smi": output_of("nvidia-smi", smi, "--format=csv,noheader"),
        "tests": last_line.strip("= "),
        "peaks": peaks(clock),
        "rows": [],
        "steps": {},
        "skipped": skipped,
    }
    attention = next(case for case in CASES if case.op == "attention")
    for case in (*CASES, without_text(attention)):
        if time.monotonic() > end:
            skipped.append(f"{case.op}: no time left")
        else:
            record["rows"] += time_case(case, clock, skipped)
            write_results(record, args.out)
    del clock
    for name in STEPS:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if time.monotonic() > end:
            skipped.append(f"training step, {name}: no time left")
        else:
            record["steps"][name] = training_steps(name)
            write_results(record, args.out)
    print(summary(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
