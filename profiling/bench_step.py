"""A training step of ours against eager, torch.compile and the released MIRO, side by side.

    pip install --no-deps --target released miro-t2i==0.1.4 && pip install einops
    python profiling/bench_step.py --released released [--scale 4 --batch 4 --text 128 ...]

Every variant is a process of its own, and all lie side by side: round by round each takes some
steps while the others wait, so that what the machine does meanwhile strikes all. Equal are the
batch, the image tokens, and each sample's text tokens. Ours and the released step run in fp32 and
bf16, eager and compiled; the ratio is of each one's best. The released code pads texts to 256,
which is measured beside it. The width of both networks is divided by `scale`, which a CPU needs.

MFU is useful FLOPs over the peak of the device in bf16, or over --peak; without either there
is none. Peak memory on a CPU is of the whole process; what its libraries take, the compiler among
them, is beside it.

Writes step-DEVICE-DATE.json: {"variants": {...}, "ratio": {"released": x, ...}}, each ratio our
images/s over the rival's, the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
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
from measured import machine, quantiles, write

from miro.training.flops import peak_flops

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent
PADDED = 256
"""Text tokens that the released training pads to."""


@dataclass(frozen=True)
class Settings:
    """What a worker is told."""

    scale: int
    batch: int
    lengths: list[int]
    """Text tokens of each sample."""
    padded: int
    """Text tokens the released step computes with."""
    precision: str
    compiled: bool
    kernels: str
    device: str
    threads: int | None
    warmup: int


@dataclass(frozen=True)
class Variant:
    """One way to train: whose step, and what differs from the common settings."""

    name: str
    released: bool = False
    changes: tuple[tuple[str, Any], ...] = ()

    def settings(self, common: Settings) -> Settings:
        return replace(common, **dict(self.changes))


def variants(common: Settings, precisions: list[str], released: bool) -> list[Variant]:
    """Ours compiled and eager, the same on torch's kernels on a GPU, and theirs."""
    found = []
    for precision in precisions:
        low = ("precision", precision)
        for compiled in (True, False):
            how = "compiled" if compiled else "eager"
            changes = (low, ("compiled", compiled))
            found.append(Variant(f"ours {how} {precision}", changes=changes))
            if common.device == "cuda":
                torch_only = (*changes, ("kernels", "torch"))
                found.append(Variant(f"torch {how} {precision}", changes=torch_only))
            if released:
                found.append(Variant(f"released {how} {precision}", True, changes))
    if released:
        best = (("precision", precisions[-1]), ("compiled", True), ("padded", PADDED))
        found.append(Variant(f"released, texts padded to {PADDED}", True, best))
    return found


class Worker:
    """The process of a variant, which takes steps when it is asked."""

    def __init__(self, variant: Variant, settings: Settings, released: Path | None) -> None:
        self.name, self.batch, self.precision = variant.name, settings.batch, settings.precision
        script = "released_worker.py" if variant.released else "our_worker.py"
        paths = [released] if variant.released else [ROOT, ROOT / "kernels"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, str(HERE / script), json.dumps(asdict(settings))]
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
            text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self.first = self._answer()
        self.rounds: list[list[dict[str, float]]] = []
        self.peak = 0

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        self.said.seek(0)
        said = self.said.read().strip().splitlines()
        raise ValueError(f"{self.name} ended: {said[-1] if said else 'it said nothing'}")

    def take(self, steps: int) -> None:
        assert self.process.stdin
        print(steps, file=self.process.stdin, flush=True)
        answer = self._answer()
        self.rounds.append(answer["steps"])
        self.peak = max(self.peak, answer["peak_bytes"])

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def rates(self) -> list[float]:
        """Images/s of each round, by its median step, the making of data left out."""
        return [self.batch / statistics.median(map(_step, steps)) for steps in self.rounds]

    def row(self) -> dict[str, Any]:
        steps = [step for steps in self.rounds for step in steps]
        return {
            "precision": self.precision,
            "images_per_second": quantiles([self.batch / _step(step) for step in steps]),
            "milliseconds": {
                phase: quantiles([1e3 * step[phase] for step in steps]) for phase in steps[0]
            },
            "peak_bytes": self.peak,
            "library_bytes": self.first["library_bytes"],
            "start_seconds": self.first["start_seconds"],
            "counted": self.first["counted"],
        }


def _step(phases: dict[str, float]) -> float:
    return sum(seconds for phase, seconds in phases.items() if phase != "data")


def ratio(ours: Worker, theirs: Worker) -> dict[str, float]:
    """Our images/s over theirs, round by round: median and spread."""
    pairs = zip(ours.rates(), theirs.rates(), strict=True)
    return quantiles([a / b for a, b in pairs])


def best(workers: list[Worker], start: str) -> Worker | None:
    """The fastest of those whose names begin so."""
    own = [worker for worker in workers if worker.name.startswith(start)]
    return max(own, key=lambda worker: statistics.median(worker.rates()), default=None)


def ratios(workers: list[Worker]) -> dict[str, dict[str, float]]:
    """Our best against each rival's."""
    ours = best(workers, "ours")
    assert ours is not None
    rivals = {
        "released": best(workers, "released "),
        "released padded": best(workers, "released,"),
        "eager": best(workers, "torch eager") or best(workers, "ours eager"),
        "compile": best(workers, "torch compiled"),
    }
    return {name: ratio(ours, rival) for name, rival in rivals.items() if rival}


def utilise(rows: dict[str, dict[str, Any]], peaks: dict[str, float | None]) -> None:
    """Add `mfu` to the rows whose precision has a peak, in FLOP/s.

    A compiled step needs what the same step needs eager, where it is counted.
    """
    useful = {
        _owner(name): row["counted"]["useful_flops"] for name, row in rows.items() if row["counted"]
    }
    for name, row in rows.items():
        flops, peak = useful.get(_owner(name)), peaks[row["precision"]]
        if flops and peak:
            row["mfu"] = flops * row["images_per_second"]["median"] / peak


def _owner(variant: str) -> str:
    """Whose network it is: ours, with either kernels, or the released one."""
    return "released" if variant.startswith("released") else "ours"


def table(record: dict[str, Any]) -> str:
    """The record as the lines of a table."""
    lines = [
        f"{'':32}{'images/s':>10}{'p20':>9}{'p80':>9}{'ms':>9}{'GB':>7}{'libraries':>10}"
        f"{'GFLOP an image':>16}{'MFU':>7}"
    ]
    for name, row in record["variants"].items():
        rate, milliseconds = row["images_per_second"], row["milliseconds"]
        whole = sum(q["median"] for phase, q in milliseconds.items() if phase != "data")
        flops = row["counted"].get("executed_flops", 0) / 1e9
        percent = f"{row['mfu']:.1%}" if "mfu" in row else ""
        lines.append(
            f"{name:32}{rate['median']:10.2f}{rate['p20']:9.2f}{rate['p80']:9.2f}{whole:9.0f}"
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
    """A ragged batch of texts whose mean is about half the longest."""
    return [longest] + [1 + 37 * n % longest for n in range(1, batch)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--released", type=Path, help="folder with the package miro-t2i")
    parser.add_argument("--scale", type=int, default=4, help="divides the width of both")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text", type=int, default=128, help="tokens of every text")
    parser.add_argument("--ragged", action="store_true", help="texts of 1 to --text tokens")
    parser.add_argument("--steps", type=int, default=3, help="of a variant in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the variants, by their names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", type=float, metavar="FLOP/S", help="of the device, for MFU")
    parser.add_argument("--out", type=Path, default=ROOT / "profiling" / "results")
    given = parser.parse_args()
    lengths = text_lengths(given.batch, given.text) if given.ragged else [given.text] * given.batch
    common = Settings(
        given.scale, given.batch, lengths, given.text, given.precisions[0], False, "auto",
        given.device, given.threads, given.warmup,
    )  # fmt: skip
    workers, failed = [], {}
    every = variants(common, given.precisions, given.released is not None)
    if unknown := set(given.only or ()) - {variant.name for variant in every}:
        names = ", ".join(variant.name for variant in every)
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {names}")
    if given.only and not any(name.startswith("ours") for name in given.only):
        parser.error(f"--only must have one of ours to compare with, got {', '.join(given.only)}")
    for variant in every:
        if given.only and variant.name not in given.only:
            continue
        try:
            workers.append(Worker(variant, variant.settings(common), given.released))
        except ValueError as error:
            # A rival that does not start is told, and the others are measured.
            if variant.name.startswith("ours"):
                raise
            failed[variant.name] = str(error)
        print(f"{variant.name}: {'failed' if variant.name in failed else 'ready'}", flush=True)
    for _ in range(given.rounds):
        for worker in workers:
            worker.take(given.steps)
    device = torch.device(given.device)
    peaks = {name: given.peak or peak_flops(device, name) for name in given.precisions}
    rows = {worker.name: worker.row() for worker in workers}
    utilise(rows, peaks)
    record = {
        **machine(given.device),
        "settings": {**asdict(common), "steps": given.steps, "rounds": given.rounds},
        "peak_flops": peaks,
        "variants": rows,
        "ratio": ratios(workers),
        "failed": failed,
    }
    for worker in workers:
        worker.close()
    print(table(record))
    if not any(peaks.values()):
        print(f"no MFU: the peak of {record['device']} is not known; give --peak FLOP/S")
    write(record, given.out / f"step-{given.device}-{record['date']}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
