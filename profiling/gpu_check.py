"""Proves and times the kernels on a GPU: one command, one page, under half an hour.

    python profiling/gpu_check.py [--out profiling/results] [--minutes 28]

First every kernel's tests run on the device; where one fails nothing is timed. Then each op at the
shapes of the 0.36 B preset: these kernels, eager torch, torch.compile, cuDNN for attention without
text, and flash-attn and Liger where they import. Times are medians (20th to 80th percentile) of
single calls between events, the second-level cache overwritten before each and the device kept busy
while the host prepares, so that launches are not what is timed. Rates are of the least bytes, or of
attention's FLOPs, as a share of what a copy and a matrix product reach on this device. Last, whole
training steps.

Exits 2 on a machine without a GPU, 1 where a test fails.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import statistics
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
from measured import commit
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from miro import flow
from miro.model.packed_text import pack
from miro.model.transformer import FlowTransformer, RewardCond
from miro.training.batch_plan import BatchPlan
from miro.training.engine import Engine
from miro.training.presets import preset
from miro_kernels import use_backend
from miro_kernels.lab.case_metrics import gradients_for, leaves_of, outputs_of
from miro_kernels.lab.cases import BATCH, CASES, Arguments, Case, Make

ROOT = Path(__file__).parent.parent
DEVICE = "cuda"
DTYPE = torch.bfloat16
LATENTS, TEXT_CHANNELS, REWARDS, LEVELS = (4, 32, 32), 2048, 7, 64
STEP_BATCH = 64
WITHOUT_TEXT = "attention without text"
RIVALS = ("kernels", "eager", "torch.compile", "cuDNN", "flash-attn", "Liger")

NOT_COMPILED = (InductorError, TorchDynamoException)

# A backward that is timed runs many times on what one forward kept.
torch._functorch.config.donated_buffer = False

Run = Callable[[], Any]


class Clock:
    """Times single calls on the device."""

    def __init__(self, repeats: int = 50) -> None:
        self.repeats = repeats
        # More than any second-level cache holds.
        self.flushed = torch.empty(512 * 2**20, dtype=torch.int8, device=DEVICE)

    def __call__(self, run: Run) -> dict[str, float]:
        """Milliseconds: median, 20th and 80th percentile."""
        for _ in range(5):
            run()
        pairs = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.zero_()
            torch.cuda._sleep(1_000_000)  # half a millisecond, for the host to get ahead
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        times = sorted(start.elapsed_time(end) for start, end in pairs)
        return {
            "median": statistics.median(times),
            "p20": times[len(times) // 5],
            "p80": times[len(times) * 4 // 5],
        }


def peaks(clock: Clock) -> dict[str, float]:
    """What this device reaches: bytes a second of a copy, FLOPs a second of a product."""
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
    """One way to compute a case: what to call, and what is differentiated."""

    name: str
    run: Run
    leaves: list[Tensor]


def by_backend(name: str, run: Run) -> Run:
    def chosen() -> Any:
        with use_backend(name):
            return run()

    return chosen


def variants(case: Case, given: Arguments, left_out: list[str]) -> Iterator[Variant]:
    """Every way that can be had; one that cannot is added to `left_out` with the reason."""
    leaves = leaves_of(given)
    yield Variant("kernels", by_backend("triton", case.prepare(given)), leaves)
    yield Variant("eager", by_backend("torch", case.prepare(given)), leaves)
    compiled = torch.compile(case.reference)
    yield Variant("torch.compile", lambda: compiled(**given), leaves)
    if case.op == WITHOUT_TEXT:
        yield Variant("cuDNN", cudnn_attention(given), leaves)
        yield Variant("flash-attn", by_backend("flash_attn", case.prepare(given)), leaves)
    if case.op == "swiglu":
        try:
            swiglu = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        except ImportError as error:
            left_out.append(f"{case.op}, Liger: {error}")
            return
        # It takes the halves apart, and what parting them costs is not counted.
        halves = [h.detach().contiguous().requires_grad_() for h in given["packed"].chunk(2, -1)]
        yield Variant("Liger", lambda: swiglu.apply(*halves), halves)


def cudnn_attention(given: Arguments) -> Run:
    """Attention of image tokens by cuDNN's kernels, of the layout it is given."""

    def run() -> Tensor:
        q, k, v = (given[name].transpose(1, 2) for name in ("q", "k", "v"))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def time_case(case: Case, clock: Clock, left_out: list[str]) -> list[dict[str, Any]]:
    """A row for each direction and variant."""
    given = case.arguments(Make(DEVICE, DTYPE), BATCH)
    with use_backend("triton"), FlopCounterMode(display=False) as counted:
        outputs = outputs_of(case.function(**given))
    # Torch counts 5 products backward for the 2 of attention forward.
    flops = {"forward": counted.get_total_flops(), "backward": counted.get_total_flops() * 2.5}
    least = case.least(given, outputs)
    rows = []
    for variant in variants(case, given, left_out):
        try:
            for direction, run in directions_of(case, variant).items():
                row = {"op": case.op, "direction": direction, "variant": variant.name}
                row |= {"bytes": least[direction], "flops": flops[direction]}
                rows.append(row | clock(run))
        except (*NOT_COMPILED, ValueError, RuntimeError) as error:
            # A rival that does not import or compile is no failure of ours.
            if variant.name == "kernels":
                raise
            left_out.append(f"{case.op}, {variant.name}: {str(error).strip().splitlines()[0]}")
    torch.cuda.empty_cache()
    return rows


def directions_of(case: Case, variant: Variant) -> dict[str, Run]:
    if "backward" not in case.directions:
        return {"forward": variant.run}
    results = outputs_of(variant.run())
    backward = partial(
        torch.autograd.grad, results, variant.leaves, gradients_for(results),
        retain_graph=True, allow_unused=True,
    )  # fmt: skip
    return {"forward": variant.run, "backward": backward}


def without_text(case: Case) -> Case:
    """Attention over image tokens alone, which flash-attn takes too."""

    def arguments(make: Make, batch: int) -> Arguments:
        given = case.arguments(make, batch)
        empty = {name: given[name].detach()[:0].requires_grad_() for name in ("text_k", "text_v")}
        offsets = torch.zeros_like(given["text_offsets"])
        return given | empty | {"text_offsets": offsets, "longest_text": 0}

    return replace(case, op=WITHOUT_TEXT, arguments=arguments)


STEPS = {
    "kernels": ("triton", False),
    "eager": ("torch", False),
    "kernels, rest compiled": ("triton", True),
    "compiled": ("torch", True),
}


def training_steps(name: str, steps: int = 12) -> dict[str, float]:
    """Milliseconds of a whole optimizer step of the 0.36 B preset, and the loss after `steps`."""
    backend, compiled = STEPS[name]
    config = preset("small")
    torch.manual_seed(0)
    model = FlowTransformer(config.model, LATENTS, TEXT_CHANNELS, REWARDS)
    engine = Engine(
        model, config.optimizer, BatchPlan(0, 1, STEP_BATCH, 1), total_images=config.images,
        precision="bf16", compiled=compiled, device=DEVICE,
    )  # fmt: skip
    draw = torch.Generator(DEVICE).manual_seed(1)
    x, noise = (torch.randn(STEP_BATCH, *LATENTS, generator=draw, device=DEVICE) for _ in range(2))
    t = torch.rand(STEP_BATCH, generator=draw, device=DEVICE)
    bins = torch.randint(LEVELS, (STEP_BATCH, REWARDS), generator=draw, device=DEVICE)
    levels = torch.linspace(0, 1, LEVELS, device=DEVICE)
    rewards = RewardCond(levels, bins, bins > LEVELS // 8)
    lengths = [8 + 37 * n % 120 for n in range(STEP_BATCH)]
    text = pack([torch.randn(n, TEXT_CHANNELS) for n in lengths]).to(DEVICE, DTYPE)
    times, loss = [], torch.zeros(())
    with use_backend(backend):
        for _ in range(steps):
            torch.cuda.synchronize()
            started = time.perf_counter()
            predicted = engine.predict(flow.add_noise(x, noise, t), t, rewards, text)
            loss = flow.velocity_errors(config.flow, predicted, x, noise, t).mean()
            engine.backward(loss)
            engine.step(config.optimizer.warmup_images)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) * 1e3)
    return {
        "milliseconds": statistics.median(times[steps // 3 :]),
        "loss": float(loss.detach()),
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9,
    }


def tests_on_the_device(seconds: float) -> tuple[bool, str]:
    """Whether the kernels' tests pass here, and pytest's closing line."""
    command = [sys.executable, "-m", "pytest", "tests/kernels/interpret", "--maxfail=20"]
    if importlib.util.find_spec("xdist"):
        # Compiling takes most of the time, and a core each.
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, f"the tests did not end in {seconds / 60:.0f} minutes"
    lines = found.stdout.strip().splitlines() or found.stderr.strip().splitlines()
    if found.returncode:
        print(found.stdout[-6000:], found.stderr[-2000:], sep="\n")
    return found.returncode == 0, lines[-1]


def share(row: dict[str, Any], peak: dict[str, float]) -> str:
    """The rate of a row and what share of the peak it is: FLOPs where they are counted."""
    if row["flops"]:
        rate = row["flops"] / row["median"] / 1e9
        return f"{rate:.0f} TFLOP/s, {rate / peak['teraflops']:.0%}"
    rate = row["bytes"] / row["median"] / 1e6
    return f"{rate:.0f} GB/s, {rate / peak['gigabytes']:.0%}"


def page(record: dict[str, Any]) -> str:
    peak = record["peaks"]
    rows = {(r["op"], r["direction"], r["variant"]): r for r in record["rows"]}
    lines = [
        f"# Kernels on {record['device']}\n",
        f"{record['date']}, commit {record['commit']}, torch {record['torch']}, triton "
        f"{record['triton']}, driver and clocks: {record['smi']}. Measured peaks: "
        f"{peak['gigabytes']:.0f} GB/s copying, {peak['teraflops']:.0f} TFLOP/s in bf16.",
        f"\nTests on the device: {record['tests']}.",
        f"\nBatch {BATCH}, bf16, microseconds (20th to 80th percentile); rates are of the least "
        "bytes, or of attention's FLOPs, as shares of the measured peaks.\n",
        "| op | direction | " + " | ".join(RIVALS) + " | rate | fastest rival / kernels |",
        "|---" * (len(RIVALS) + 4) + "|",
    ]
    for op, direction in dict.fromkeys((r["op"], r["direction"]) for r in record["rows"]):
        found = {name: rows.get((op, direction, name)) for name in RIVALS}
        cells = [
            f"{r['median'] * 1e3:.0f} ({r['p20'] * 1e3:.0f}-{r['p80'] * 1e3:.0f})" if r else ""
            for r in found.values()
        ]
        ours = rows[op, direction, "kernels"]
        best = min(r["median"] for n, r in found.items() if r and n != "kernels")
        ratio = f"{best / ours['median']:.2f}"
        lines.append(f"| {' | '.join([op, direction, *cells, share(ours, peak), ratio])} |")
    if record["steps"]:
        lines += _steps(record["steps"])
    left_out = [f"- {reason}" for reason in record["left_out"]] or ["nothing"]
    return "\n".join([*lines, "\nLeft out:\n", *left_out]) + "\n"


def _steps(steps: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        f"\nTraining step of the 0.36 B preset, {STEP_BATCH} images, whole: forward, backward, "
        "clipping and optimizer.\n",
        "| | ms | images/s | loss | GB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, step in steps.items():
        rate = STEP_BATCH / step["milliseconds"] * 1e3
        lines.append(
            f"| {name} | {step['milliseconds']:.1f} | {rate:.0f} | {step['loss']:.5f} | "
            f"{step['gigabytes']:.1f} |"
        )
    return lines


def write(record: dict[str, Any], folder: Path) -> None:
    """What was measured so far: a machine may be taken away before the end."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-{record['device'].replace(' ', '-')}-{record['date']}"
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(page(record))


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return found.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "profiling" / "results")
    parser.add_argument(
        "--commit", default=commit(),
        help="of this code, where its folder is no checkout",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=28, help="what is not begun by then, is not"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: this machine has no GPU that torch can use; nothing was checked.")
        print("The proofs that need none: make test, python profiling/kernel_report.py")
        return 2
    end = time.monotonic() + 60 * options.minutes
    passed, closing = tests_on_the_device(60 * options.minutes)
    print(closing)
    if not passed:
        print("gpu-check: the kernels are wrong on this device; nothing was timed")
        return 1
    smi = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    clock, left_out = Clock(), []
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": options.commit,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "smi": output_of("nvidia-smi", smi, "--format=csv,noheader"),
        "tests": closing.strip("= "),
        "peaks": peaks(clock),
        "rows": [],
        "steps": {},
        "left_out": left_out,
    }
    attention = next(case for case in CASES if case.op == "attention")
    for case in (*CASES, without_text(attention)):
        if time.monotonic() > end:
            left_out.append(f"{case.op}: no time was left")
        else:
            record["rows"] += time_case(case, clock, left_out)
            write(record, options.out)
    del clock
    for name in STEPS:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if time.monotonic() > end:
            left_out.append(f"training step, {name}: no time was left")
        else:
            record["steps"][name] = training_steps(name)
            write(record, options.out)
    print(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
