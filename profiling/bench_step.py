"""Throughput of our training step against eager, torch.compile and the released MIRO.

    pip install --no-deps --target released miro-t2i==0.1.4 && pip install einops
    python profiling/bench_step.py --released released [--scale 4 --batch 4 --text 128 ...]

Every variant has a worker process of its own. The workers are interleaved: in every round each runs
some steps while the others are idle. Batch, image tokens and text tokens are equal. Our and the
released step run in fp32 and bf16, eager and compiled; ratios compare the fastest variant of each.
The released code pads texts to 256 tokens, which is a variant too. The width of both networks is
divided by --scale, for CPUs.

MFU is useful FLOPs over the peak of miro/training/flops.py or of --peak. Peak memory on a CPU is
that of the process; the memory of its libraries, with the compiler, is given as well.

Writes step-DEVICE-DATE.json. A ratio is our images/s over those of the other, round by round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_utils import (
    HERE,
    ROOT,
    add_device,
    argument_parser,
    interleave,
    metadata,
    quantiles,
    write_json,
)
from bench_utils import ratios as ratios_of

from miro.training.flops import peak_flops

PADDED = 256  # text tokens of the released training


@dataclass(frozen=True)
class Settings:
    """Settings of a worker.

    lengths: text tokens of each sample. padded: text tokens of the released step.
    """

    scale: int
    batch: int
    lengths: list[int]
    padded: int
    precision: str
    compiled: bool
    kernels: str
    device: str
    threads: int | None
    warmup: int


@dataclass(frozen=True)
class Variant:
    """Our or the released step, with changes to the common settings."""

    name: str
    released: bool = False
    changes: tuple[tuple[str, Any], ...] = ()

    def settings(self, common: Settings) -> Settings:
        """The settings of this variant."""
        return replace(common, **dict(self.changes))


def variants(common: Settings, precisions: list[str], released: bool) -> list[Variant]:
    """Ours, ours with torch's kernels on a GPU, and the released one, compiled and eager."""
    found = []
    for precision in precisions:
        for compiled in (True, False):
            mode = "compiled" if compiled else "eager"
            changes = (("precision", precision), ("compiled", compiled))
            found.append(Variant(f"ours {mode} {precision}", changes=changes))
            if common.device == "cuda":
                torch_only = (*changes, ("kernels", "torch"))
                found.append(Variant(f"torch {mode} {precision}", changes=torch_only))
            if released:
                found.append(Variant(f"released {mode} {precision}", True, changes))
    if released:
        best = (("precision", precisions[-1]), ("compiled", True), ("padded", PADDED))
        found.append(Variant(f"released, texts padded to {PADDED}", True, best))
    return found


class Worker:
    """The process of a variant.

    started: what the worker reports after its start.

    Raises:
        ValueError: the process ended; with the last line of its errors.
    """

    def __init__(self, variant: Variant, settings: Settings, released: Path | None) -> None:
        self.name, self.batch, self.precision = variant.name, settings.batch, settings.precision
        script = "released_worker.py" if variant.released else "our_worker.py"
        paths = [released] if variant.released else [ROOT, ROOT / "kernels"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, str(HERE / script), json.dumps(asdict(settings))]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self.started = self._answer()
        self.rounds: list[list[dict[str, float]]] = []
        self.peak = 0

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        self.errors.seek(0)
        errors = self.errors.read().strip().splitlines()
        raise ValueError(f"{self.name} ended: {errors[-1] if errors else 'no error message'}")

    def run(self, steps: int) -> None:
        """Run some steps and record their seconds."""
        assert self.process.stdin
        print(steps, file=self.process.stdin, flush=True)
        answer = self._answer()
        self.rounds.append(answer["steps"])
        self.peak = max(self.peak, answer["peak_bytes"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def rates(self) -> list[float]:
        """Images/s of each round by its median step, without the generation of data."""
        return [self.batch / statistics.median(map(_step, steps)) for steps in self.rounds]

    def row(self) -> dict[str, Any]:
        """The row of this variant in the results."""
        steps = [step for steps in self.rounds for step in steps]
        return {
            "precision": self.precision,
            "images_per_second": quantiles([self.batch / _step(step) for step in steps]),
            "milliseconds": {
                phase: quantiles([1e3 * step[phase] for step in steps]) for phase in steps[0]
            },
            "peak_bytes": self.peak,
            "library_bytes": self.started["library_bytes"],
            "start_seconds": self.started["start_seconds"],
            "counted": self.started["counted"],
        }


def _step(phases: dict[str, float]) -> float:
    return sum(seconds for phase, seconds in phases.items() if phase != "data")


def fastest(workers: list[Worker], prefix: str) -> Worker | None:
    """The fastest worker whose name starts with `prefix`."""
    found = [worker for worker in workers if worker.name.startswith(prefix)]
    return max(found, key=lambda worker: statistics.median(worker.rates()), default=None)


def ratios(workers: list[Worker]) -> dict[str, dict[str, float]]:
    """Our images/s over those of each baseline, round by round, by the fastest variants."""
    ours = fastest(workers, "ours")
    assert ours is not None
    baselines = {
        "released": fastest(workers, "released "),
        "released padded": fastest(workers, "released,"),
        "eager": fastest(workers, "torch eager") or fastest(workers, "ours eager"),
        "compile": fastest(workers, "torch compiled"),
    }
    return {n: ratios_of(ours.rates(), b.rates()) for n, b in baselines.items() if b}


def add_mfu(rows: dict[str, dict[str, Any]], peaks: dict[str, float | None]) -> None:
    """Add `mfu` to the rows whose precision has a peak, in FLOP/s.

    FLOPs are counted in eager variants, and are the same in compiled ones.
    """
    useful = {
        _owner(name): row["counted"]["useful_flops"] for name, row in rows.items() if row["counted"]
    }
    for name, row in rows.items():
        flops, peak = useful.get(_owner(name)), peaks[row["precision"]]
        if flops and peak:
            row["mfu"] = flops * row["images_per_second"]["median"] / peak


def _owner(variant: str) -> str:
    """The network of a variant: ours, with either kernels, or the released one."""
    return "released" if variant.startswith("released") else "ours"


def table(record: dict[str, Any]) -> str:
    """Format the record as a table."""
    lines = [
        f"{'':32}{'images/s':>10}{'p20':>9}{'p80':>9}{'ms':>9}{'GB':>7}{'libraries':>10}"
        f"{'GFLOP/image':>16}{'MFU':>7}"
    ]
    for name, row in record["variants"].items():
        rate, milliseconds = row["images_per_second"], row["milliseconds"]
        total = sum(q["median"] for phase, q in milliseconds.items() if phase != "data")
        flops = row["counted"].get("executed_flops", 0) / 1e9
        percent = f"{row['mfu']:.1%}" if "mfu" in row else ""
        lines.append(
            f"{name:32}{rate['median']:10.2f}{rate['p20']:9.2f}{rate['p80']:9.2f}{total:9.0f}"
            f"{row['peak_bytes'] / 1e9:7.2f}{row['library_bytes'] / 1e9:10.2f}{flops or '':>16.5}"
            f"{percent:>7}"
        )
    for name, found in record["ratio"].items():
        lines.append(
            f"ours over {name}: {found['median']:.2f} ({found['p20']:.2f} to {found['p80']:.2f})"
        )
    lines += [f"{name}: {reason}" for name, reason in record["failed"].items()]
    return "\n".join(lines)


def text_lengths(batch: int, longest: int) -> list[int]:
    """Lengths from 1 to `longest`, on average about half of it."""
    return [longest] + [1 + 37 * n % longest for n in range(1, batch)]


def main() -> int:
    """Time training steps side by side, and write the result."""
    parser = argument_parser(__doc__)
    parser.add_argument("--released", type=Path, help="folder with the package miro-t2i")
    parser.add_argument("--scale", type=int, default=4, help="divides the width of both networks")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text", type=int, default=128, help="tokens per text")
    parser.add_argument("--ragged", action="store_true", help="texts of 1 to --text tokens")
    parser.add_argument("--steps", type=int, default=3, help="steps per variant and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of the variants to run")
    add_device(parser)
    parser.add_argument("--peak", type=float, metavar="FLOP/S", help="peak of the device, for MFU")
    args = parser.parse_args()
    lengths = text_lengths(args.batch, args.text) if args.ragged else [args.text] * args.batch
    common = Settings(
        args.scale, args.batch, lengths, args.text, args.precisions[0], False, "auto",
        args.device, args.threads, args.warmup,
    )  # fmt: skip
    workers, failed = [], {}
    every = variants(common, args.precisions, args.released is not None)
    if unknown := set(args.only or ()) - {variant.name for variant in every}:
        names = ", ".join(variant.name for variant in every)
        parser.error(f"--only: no variant {', '.join(sorted(unknown))}; choose from {names}")
    if args.only and not any(name.startswith("ours") for name in args.only):
        parser.error(f"--only must include a variant of ours, got {', '.join(args.only)}")
    for variant in every:
        if args.only and variant.name not in args.only:
            continue
        try:
            workers.append(Worker(variant, variant.settings(common), args.released))
        except ValueError as error:
            # Report a baseline that does not start and measure the others.
            if variant.name.startswith("ours"):
                raise
            failed[variant.name] = str(error)
        print(f"{variant.name}: {'failed' if variant.name in failed else 'ready'}", flush=True)
    runs = {worker.name: lambda _, w=worker: w.run(args.steps) for worker in workers}
    interleave(runs, args.rounds, warmup=0)
    device = torch.device(args.device)
    peaks = {name: args.peak or peak_flops(device, name) for name in args.precisions}
    rows = {worker.name: worker.row() for worker in workers}
    add_mfu(rows, peaks)
    record = {
        **metadata(args.device),
        "settings": {**asdict(common), "steps": args.steps, "rounds": args.rounds},
        "peak_flops": peaks,
        "variants": rows,
        "ratio": ratios(workers),
        "failed": failed,
    }
    for worker in workers:
        worker.close()
    print(table(record))
    if not any(peaks.values()):
        print(f"no MFU: the peak of {record['device']} is unknown; pass --peak FLOP/S")
    write_json(record, args.out / f"step-{args.device}-{record['date']}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
